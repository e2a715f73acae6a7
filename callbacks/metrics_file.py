"""Writes the metrics.json of a run."""

import json
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.files.run_folders import METRICS_FILE
from datamodules.files.writing import write_atomically
from models.reporting.run_record import tested_record


class MetricsFile(Callback):
    """Writes metrics.json after the test.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            record = tested_record(trainer, pl_module)
            write_atomically(self.folder / METRICS_FILE, json.dumps(record, indent=2) + "\n")
