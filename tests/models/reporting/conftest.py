"""One trained and tested classifier with its run folder, which the tests of reports read."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from callbacks.export_model import ExportModel
from callbacks.html_report import HtmlReport
from callbacks.metrics_file import MetricsFile
from callbacks.run_facts import RunFacts
from callbacks.saving import LastCheckpoint
from datamodules.batching.reward_rows import RewardDataModule
from models.learning.reward_classifier import RewardClassifier
from proactive.tasks import TASKS
from tests.models.small import small_classifier, small_data, small_trainer


@dataclass(frozen=True)
class Run:
    folder: Path
    classifier: RewardClassifier
    data: RewardDataModule


@pytest.fixture(scope="session")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What two epochs and a test leave behind."""
    folder = tmp_path_factory.mktemp("run")
    classifier, data, facts = small_classifier(), small_data(root), RunFacts(folder)
    torch.manual_seed(0)
    trainer = small_trainer(
        LastCheckpoint(folder / "checkpoints"),
        MetricsFile(folder, facts),
        ExportModel(folder),
        HtmlReport(folder, TASKS["reward"].page, facts),
        facts,
        max_epochs=2,
        logger=CSVLogger(folder, "", "logs"),
        log_every_n_steps=1,
    )
    trainer.fit(classifier, data)
    trainer.test(classifier, data, verbose=False)
    return Run(folder, classifier, data)
