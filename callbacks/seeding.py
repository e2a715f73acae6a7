"""The random numbers of a step depend on its index only, so a checkpoint needs no random state."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class SeedEachStep(Callback):
    """Seeds dropout and other random operations before each step.

    Args:
        seed: The seed of the run. The seed of a step depends on it, the epoch, the index of the step and the rank.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = 0
        for part in (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank):
            seed = (seed * 6_364_136_223_846_793_005 + part + 1_442_695_040_888_963_407) % 2**63  # Knuth's MMIX
        torch.manual_seed(seed)
