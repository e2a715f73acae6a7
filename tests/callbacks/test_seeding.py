"""SeedEachStep: the random numbers of a step depend only on seed, epoch, step and rank."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.seeding import SeedEachStep
from tests.models.small import fit, small_classifier, small_data


class Draws(Callback):
    """Draws at the start of each step, as dropout would; `waste` draws more after each."""

    def __init__(self, waste: int = 0) -> None:
        self.waste = waste
        self.drawn: dict[tuple[int, int], float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.drawn[trainer.current_epoch, batch_idx] = float(torch.rand(1, dtype=torch.float64))

    def on_train_batch_end(self, *args: Any) -> None:
        torch.rand(self.waste)


def drawn(root: Path, seed: int, waste: int = 0) -> dict[tuple[int, int], float]:
    draws = Draws(waste)
    fit(small_classifier(), small_data(root), SeedEachStep(seed), draws, max_epochs=2, limit_val_batches=0)
    return draws.drawn


def test_random_numbers_of_a_step_depend_only_on_seed_epoch_and_step(root: Path) -> None:
    """Earlier random numbers have no effect, so a resumed run needs no state of the generator."""
    first = drawn(root, seed=7)
    assert drawn(root, seed=7, waste=3) == first
    assert len(set(first.values())) == len(first), "no two steps of two epochs draw alike"
    assert not set(drawn(root, seed=8).values()) & set(first.values())


def test_ranks_draw_different_random_numbers() -> None:
    """A fake trainer gives the rank: the callback reads only two of its numbers, and two ranks need two processes."""
    numbers = []
    for rank in (0, 1, 2, 0):
        trainer: Any = SimpleNamespace(current_epoch=1, global_rank=rank)
        SeedEachStep(7).on_train_batch_start(trainer, small_classifier(), None, 3)
        numbers.append(float(torch.rand(1)))
    assert len(set(numbers)) == 3
    assert numbers[0] == numbers[3]
