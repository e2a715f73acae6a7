"""Writes the metrics of a run, and what it decided on each test row."""

import json
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.run_facts import RunFacts
from datamodules.files.run_folders import DECISIONS_FILE, METRICS_FILE
from datamodules.files.writing import write_atomically
from models.learning.training import BackboneModule
from models.reporting.decided_rows import decided_rows_text
from models.reporting.run_record import tested_record


class MetricsFile(Callback):
    """Writes decisions.jsonl and metrics.json after the test.

    Args:
        folder: The run folder.
        facts: What metrics.json states about the run besides its metrics.
    """

    def __init__(self, folder: Path, facts: RunFacts) -> None:
        self.folder = folder
        self.facts = facts

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, BackboneModule)
            data = trainer.datamodule  # type: ignore[attr-defined]
            write_atomically(self.folder / DECISIONS_FILE, decided_rows_text(pl_module, data))
            record = tested_record(trainer, pl_module) | {"run": self.facts.record()}
            write_atomically(self.folder / METRICS_FILE, json.dumps(record, indent=2) + "\n")
