"""Writes the report.html of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.run_facts import RunFacts
from datamodules.batching.rows import RowsDataModule
from datamodules.files.run_folders import REPORT_FILE
from datamodules.files.writing import write_atomically
from models.learning.training import BackboneModule
from models.reporting.run_record import tested_record

Page = Callable[[dict[str, Any], BackboneModule, RowsDataModule, Path], str]  # record, model, data, run folder -> HTML


class HtmlReport(Callback):
    """Writes report.html after the test.

    Args:
        folder: The run folder.
        page: Returns the page as HTML.
        facts: What the report states about the run besides its metrics.
    """

    def __init__(self, folder: Path, page: Page, facts: RunFacts) -> None:
        self.folder = folder
        self.page = page
        self.facts = facts

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, BackboneModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        record = tested_record(trainer, pl_module) | {"run": self.facts.record()}
        page = self.page(record, pl_module, data, self.folder)
        write_atomically(self.folder / REPORT_FILE, page)
