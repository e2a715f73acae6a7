"""report.html of a run."""

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.samples import read_samples
from datamodules.files.run_folders import LOGS, REPORT_FILE
from datamodules.files.writing import write_atomically
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.reporting.run_page import agent_report, read_curves, report
from models.reporting.run_record import tested_record


class HtmlReport(Callback):
    """Writes report.html when the test has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        record = tested_record(trainer, pl_module)
        curves = read_curves(sorted((self.folder / LOGS).glob("metrics*.csv")))
        if isinstance(pl_module, RewardClassifier):
            test = trainer.datamodule.split.test  # type: ignore[attr-defined]
            page = report(record, pl_module.test_rows, test, curves)
        else:
            assert isinstance(pl_module, ProactiveAgent)
            page = agent_report(record, pl_module.test_rows, read_samples(self.folder / LOGS), curves)
        write_atomically(self.folder / REPORT_FILE, page)
