"""docs/metrics.md against real runs: each metric that a run logs is on the page, and nothing else is."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.corpus.records import Category
from proactive import fit
from tests.helpers import ROOT, SMALL_RUN, small_root

READINGS = ("raw", "calibrated", "f1_optimal")
NO_METRICS = {"epoch", "step"}  # other columns of metrics.csv
RUN = [*SMALL_RUN, "--trainer.max_epochs=5", "--trainer.log_every_n_steps=1", "--run.name=run"]
TASKS = {
    "reward": (["--task=reward"], ["All tasks", "Reward classifier"]),
    "agent": (["--task=agent", "--model.sampled_answers=2"], ["All tasks", "Agent"]),
    "preference": (
        ["--task=preference", "--model.objective=kto", "--model.sampled_answers=2"],
        ["All tasks", "Agent", "Preference training"],
    ),
}


def page_metrics(section: str) -> set[str]:
    """The metrics in a section that a run on a CPU logs. Placeholders are replaced with all their values."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    names = set()
    for cells in (line.split("|") for line in text.splitlines() if line.startswith("| `")):
        if "on a known GPU" not in cells[2]:
            names |= set(re.findall(r"`([^`]+)`", cells[1]))
    for placeholder, values in (("READING", READINGS), ("CATEGORY", tuple(Category))):
        names = {name.replace(placeholder, value) for name in names for value in values}
    return names


@pytest.mark.parametrize("task", TASKS)
def test_the_page_lists_exactly_the_metrics_that_a_run_logs(task: str, call: Callable, tmp_path: Path) -> None:
    options, sections = TASKS[task]
    root = small_root(tmp_path / "root", rows_per_scene=20)
    ended = call(fit.main, *RUN, *options, f"--data.root={root}")
    assert ended.code in (0, None), ended.err
    folder = tmp_path / "runs" / "run" / "0"
    with (folder / "logs" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        logged = set(next(csv.reader(file))) - NO_METRICS
    listed = set[str]().union(*map(page_metrics, sections))
    assert sorted(logged - listed) == [], "metrics that the page lacks"
    assert sorted(listed - logged) == [], "metrics that no run logs"
    tested = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]
    assert {f"test/{reading}_{name}" for reading, found in tested.items() for name in found} == {
        name for name in listed if name.startswith("test/")
    }
