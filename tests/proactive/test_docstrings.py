"""The examples in docstrings run, in a folder with a small judge and a small agent as they name them."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers import SMALL_RUN, command
from tests.proactive.conftest import FinishedRun

EXAMPLES = {
    "proactive.loading": ("load_judge", "load_agent"),
    "datamodules.batching.prefix_tree": ("build_tree",),
    "datamodules.batching.reward_rows": ("RewardDataModule",),
    "datamodules.batching.answer_rows": ("AgentDataModule",),
    "models.learning.reward_classifier": ("RewardClassifier",),
    "models.learning.proactive_agent": ("ProactiveAgent",),
    "models.judging.agents": ("Agent",),
    "models.judging.gate_curve": ("gate_threshold",),
    "models.judging.judges": ("Judge",),
    "models.judging.scorer": ("Scorer",),
    "models.learning.preference_losses": ("dpo_losses",),
    "models.online.rewards": ("advantages",),
}


@pytest.fixture(scope="module")
def folder(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs runs/reward-tiny/0 and runs/agent-tiny/0."""
    folder = tmp_path_factory.mktemp("examples")
    options = ["--task=agent", "--run.name=agent-tiny", f"--data.root={finished_run.root}", *SMALL_RUN]
    ended = command("proactive.fit", *options, "--trainer.max_steps=2", "--model.sampled_answers=1", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    (folder / "runs" / "reward-tiny").symlink_to(finished_run.folder.parent)
    return folder


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in EXAMPLES.items() for name in names])
def test_an_example_gives_what_it_shows(module: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    named = getattr(import_module(module), name)
    (example,) = (test for test in doctest.DocTestFinder(recurse=False).find(named, name) if test.examples)
    report: list[str] = []
    found = doctest.DocTestRunner(optionflags=doctest.REPORT_ONLY_FIRST_FAILURE).run(example, out=report.append)
    assert found.attempted > 0
    assert found.failed == 0, "".join(report)
