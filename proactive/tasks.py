"""Everything that defines a task. A new task is a new entry of `TASKS`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from callbacks.samples import SampledAnswers, read_samples
from datamodules.batching.rows import RowsDataModule
from datamodules.files.run_folders import LOGS
from models.learning.preference_agent import PreferenceAgent
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.learning.training import BackboneModule
from models.online.online_agent import OnlineAgent
from models.reporting.run_page import agent_report, read_curves, reward_report
from proactive.tables import Record, Table, decision_tables, preference_tables, reward_tables


@dataclass(frozen=True)
class Task:
    """One kind of model.

    Attributes:
        module: The LightningModule. It names its data module, the fields of its checkpoints, and texts of its card.
        tables: Returns the tables of a test for the terminal, from its record.
        page: Returns report.html, from the record, the tested module, its data and the run folder.
        callbacks: Returns additional callbacks of its training, from the run folder.
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


def _sampled_answers(folder: Path) -> list[Callback]:
    return [SampledAnswers(folder / LOGS)]


TASKS = {
    task.module.task: task
    for task in (
        Task(RewardClassifier, reward_tables, _reward_page, lambda folder: []),
        Task(ProactiveAgent, decision_tables, _agent_page, _sampled_answers),
        Task(PreferenceAgent, preference_tables, _agent_page, _sampled_answers),
        Task(OnlineAgent, decision_tables, _agent_page, _sampled_answers),
    )
}
