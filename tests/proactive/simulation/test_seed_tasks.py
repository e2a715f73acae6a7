"""Seed tasks: the published file, the embedded ones, and invalid files."""

from itertools import islice
from pathlib import Path

import pytest

from datamodules.errors import UserError
from proactive.simulation.contamination import events_of_test_traces
from proactive.simulation.seed_tasks import SeedTasks, embedded_seeds, read_seeds, tasks_in_turn, without_test_samples
from tests.helpers import PROACTIVEBENCH, needs_proactivebench


@needs_proactivebench
def test_106_of_the_168_published_sample_events_are_in_the_test_traces_and_are_removed() -> None:
    given = read_seeds(PROACTIVEBENCH / "scenes" / "seedtask.yaml")
    tested = events_of_test_traces(str(PROACTIVEBENCH))
    counts = {
        "sample_events": {"codingassistant": 65, "writingassistant": 78, "dailyassistant": 25},
        "sample_events_of_test_traces": {"codingassistant": 41, "writingassistant": 58, "dailyassistant": 7},
    }
    seeds, record = without_test_samples(given, tested, contaminated=False)
    assert record == {**counts, "contaminated": False}
    assert sum(record["sample_events_of_test_traces"].values()) == 106
    assert {kind: len(seed.sample_events) for kind, seed in seeds.items()} == {
        "codingassistant": 24,
        "writingassistant": 20,
        "dailyassistant": 18,
    }
    assert not any(event in tested for seed in seeds.values() for event in seed.sample_events)
    assert [seed.tasks for seed in seeds.values()] == [seed.tasks for seed in given.values()]
    assert without_test_samples(given, tested, contaminated=True) == (given, {**counts, "contaminated": True})


def test_kept_sample_events_that_are_in_no_test_trace_contaminate_nothing() -> None:
    seeds = {"a": SeedTasks(tasks=["Rest."], sample_events=["The user rests."])}
    assert without_test_samples(seeds, {"The user works."}, contaminated=True)[1]["contaminated"] is False


def test_tasks_are_used_in_turn_one_of_each_kind() -> None:
    seeds = {"a": SeedTasks(tasks=["1", "2", "3"]), "b": SeedTasks(tasks=["4"])}
    assert list(tasks_in_turn(seeds)) == [("a", "1"), ("b", "4"), ("a", "2"), ("a", "3")]
    assert [kind for kind, _ in islice(tasks_in_turn(embedded_seeds()), 4)] == ["coding", "writing", "daily", "coding"]
    assert len(list(tasks_in_turn(embedded_seeds()))) == 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "seeds.yaml: expected a mapping of kinds to tasks"),
        ("- a", "seeds.yaml: expected a mapping of kinds to tasks"),
        ("{}", "seeds.yaml: expected a mapping of kinds to tasks"),
        ("a: [", "seeds.yaml is not YAML"),
        ("a: 1", "seeds.yaml, kind a"),
        ("a: {sample_events: []}", "kind a, field tasks: Field required"),
        ("a: {tasks: []}", "kind a, field tasks: List should have at least 1 item"),
        ("a: {tasks: [' ']}", "kind a, field tasks[0]: expected text, got a blank"),
        ("a: {tasks: [A], samples: [B]}", "kind a, field samples"),
        (f"a: {{tasks: [{'x' * 2001}]}}", "kind a, field tasks[0]: expected at most 2000 characters, got 2001"),
        ("- {environment: {description: A, entities: [B]}, user: {description: A, goal: B}}", "expected a mapping"),
    ],
)
def test_invalid_seeds_are_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "seeds.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"seeds\.yaml") as refused:
        read_seeds(file)
    assert said in refused.value.what
    assert "docs/how-to/simulate.md" in refused.value.hint
