"""What a task is, from its module to its report. One more task is one more entry of `TASKS`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from callbacks.samples import SampledAnswers, read_samples
from datamodules.batching.rows import RowsDataModule
from datamodules.files.run_folders import LOGS
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.learning.training import BackboneModule
from models.reporting.run_page import agent_report, read_curves, reward_report
from proactive.terminal import Table, decision_tables, reward_tables

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One kind of model.

    Attributes:
        module: The LightningModule, which names its data module, its checkpoints' record, and what its card says.
        tables: What a test found out, for a terminal.
        page: report.html, of the record, the tested module, its data and the run folder.
        callbacks: What else happens around its training, in a run folder.
    """

    module: type[BackboneModule]
    tables: Callable[[Record], list[Table]]
    page: Callable[[Record, BackboneModule, RowsDataModule, Path], str]
    callbacks: Callable[[Path], list[Callback]]

    @property
    def data(self) -> type[RowsDataModule]:
        """The data module."""
        return self.module.data_class


def _reward_page(record: Record, model: BackboneModule, data: RowsDataModule, folder: Path) -> str:
    return reward_report(record, model.test_rows, data.split.test, read_curves(folder / LOGS))


def _agent_page(record: Record, model: BackboneModule, data: RowsDataModule, folder: Path) -> str:
    return agent_report(record, model.test_rows, read_samples(folder / LOGS), read_curves(folder / LOGS))


TASKS = {
    task.module.task: task
    for task in (
        Task(RewardClassifier, reward_tables, _reward_page, lambda folder: []),
        Task(ProactiveAgent, decision_tables, _agent_page, lambda folder: [SampledAnswers(folder / LOGS)]),
    )
}
DEFAULT_TASK = RewardClassifier.task
