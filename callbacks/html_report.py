"""Writes the report.html of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

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
    """

    def __init__(self, folder: Path, page: Page) -> None:
        self.folder = folder
        self.page = page

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, BackboneModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        page = self.page(tested_record(trainer, pl_module), pl_module, data, self.folder)
        write_atomically(self.folder / REPORT_FILE, page)
