"""Randomness of a step as a function of its number, so that a resumed run needs no random state."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class SeedEachStep(Callback):
    """Seeds PyTorch before each step, so that dropout depends on the run's seed, the epoch, the step and the rank only.

    Args:
        seed: The seed of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = 0
        for part in (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank):
            seed = (seed * 6_364_136_223_846_793_005 + part + 1_442_695_040_888_963_407) % 2**63  # Knuth's MMIX
        torch.manual_seed(seed)
