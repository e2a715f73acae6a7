"""The answers that an agent writes at each validation, in a CSV file."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.escaping import from_cell, to_cell
from datamodules.files.writing import naming_write_errors
from models.learning.proactive_agent import ProactiveAgent

SAMPLES = "answers.csv"
COLUMNS = ("epoch", "step", "history", "event", "help_needed", "answer", "valid")


class SampledAnswers(Callback):
    """Appends the answers sampled at each validation to answers.csv.

    Args:
        folder: Folder of answers.csv.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SAMPLES

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, ProactiveAgent)
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with naming_write_errors(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            place = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            writer.writerows({**place, **_cells(sample, to_cell)} for sample in pl_module.samples)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of answers.csv. A resumed run may write a row again; the last one counts."""
    if not (folder / SAMPLES).exists():
        return []
    with (folder / SAMPLES).open(newline="", encoding="utf-8") as file:
        # A killed run may leave an incomplete last row.
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return list({(row["step"], row["history"]): _cells(row, from_cell) for row in rows}.values())


def _cells(row: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, str) else value for name, value in row.items()}
