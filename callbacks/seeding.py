"""Randomness of a step as a function of its number, so that it needs no state."""

import os
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class SeedEachStep(Callback):
    """Seeds dropout and the like before each step from the run's seed, the epoch, the step's place and the rank."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        run_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        seed = 0
        for part in (run_seed, trainer.current_epoch, batch_idx, trainer.global_rank):
            seed = (seed * 6_364_136_223_846_793_005 + part + 1_442_695_040_888_963_407) % 2**63  # Knuth's MMIX
        torch.manual_seed(seed)
