"""Embedded data: one seed, one data set; enough of it, by the same rules, learnable but not trivial."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from datamodules.batching.answer_rows import probes
from datamodules.corpus.records import AnnotatedRow, Category, Event
from datamodules.corpus.simulator import simulate
from datamodules.corpus.sources import Corpus
from datamodules.corpus.splits import split_by_scene
from tests.helpers import ROOT
from tests.patience import HANG

# Simulates under an eye that sees every file opened for writing and every change to a folder.
WATCHED = """
import hashlib, os, sys
from datamodules.corpus.simulator import simulate

def watch(event, arguments):
    if event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise PermissionError(f"opened {arguments[0]} for writing")
    if event in ("os.mkdir", "os.rename", "tempfile.mkstemp", "tempfile.mkdtemp"):
        raise PermissionError(event)

sys.addaudithook(watch)
train, test, traces = simulate(7)
print(hashlib.sha256(repr((train, test, traces)).encode()).hexdigest())
"""


def seconds(time: str) -> float:
    """Epoch seconds, or minutes into the first day for times in words."""
    words = re.fullmatch(r"Day (\d+), (\d+):(\d\d) (AM|PM)", time)
    if not words:
        return float(time)
    day, hour, minute, half = words.groups()
    return ((int(day) * 24 + int(hour) % 12 + 12 * (half == "PM")) * 60 + int(minute)) * 60


def scenes_of(rows: list[AnnotatedRow]) -> dict[str, list[AnnotatedRow]]:
    scenes: dict[str, list[AnnotatedRow]] = {}
    for row in rows:
        scenes.setdefault(row.scene, []).append(row)
    return scenes


def test_equal_seeds_give_equal_data_in_any_process_and_write_nothing(tmp_path: Path) -> None:
    """Another process has other hashes, so another order of sets."""
    printed = subprocess.run(
        [sys.executable, "-c", WATCHED],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
    ).stdout.strip()
    assert printed == hashlib.sha256(repr(simulate(7)).encode()).hexdigest()
    assert list(tmp_path.iterdir()) == []


def test_other_seed_gives_other_data() -> None:
    assert simulate(1) == simulate(1)
    assert simulate(1) != simulate(2)


def test_each_category_and_state_is_frequent(embedded: Corpus) -> None:
    assert len(scenes_of(embedded.rows)) >= 48
    assert 1_800 <= len(embedded.rows) <= 2_400
    assert scenes_of(embedded.train).keys().isdisjoint(scenes_of(embedded.test))
    for rows in (embedded.train, embedded.test):
        counts = Counter(row.category for row in rows)
        assert counts.keys() == set(Category)
        assert min(counts.values()) >= 10
    assert {name.split("_")[0] for name in embedded.traces} == {"coding", "writing", "daily"}


def test_rows_follow_the_rules_of_the_records(embedded: Corpus) -> None:
    """Written out and read back, with the category stated, each row is the same."""
    for row in embedded.rows:
        assert AnnotatedRow.model_validate(row.published()).published() == row.published()


def test_three_annotators_decide_by_majority_and_sometimes_disagree(embedded: Corpus) -> None:
    assert all(len(row.annotation) == 3 for row in embedded.rows)
    assert all(row.accepted == (sum(row.annotation) >= 2) for row in embedded.rows)
    agreement = sum(a == row.accepted for row in embedded.rows for a in row.annotation) / (3 * len(embedded.rows))
    assert 0.8 < agreement < 0.97
    assert len({row.annotation for row in embedded.rows}) == 8


def test_times_ascend_as_epoch_text_in_some_scenes_and_as_words_in_others(embedded: Corpus) -> None:
    for row in embedded.rows:
        times = [seconds(event.time) for event in row.history]
        assert times == sorted(times)
    worded = Counter(rows[0].history[0].time.startswith("Day ") for rows in scenes_of(embedded.rows).values())
    assert min(worded[True], worded[False]) >= 5


def test_histories_of_a_scene_nest(embedded: Corpus) -> None:
    for rows in scenes_of(embedded.rows).values():
        longest = max((row.history for row in rows), key=len)
        assert {row.history for row in rows} == {longest[: size + 1] for size in range(len(longest))}


@pytest.mark.parametrize("seed", range(4))
def test_all_rows_of_a_history_agree_whether_help_is_needed(seed: int) -> None:
    """All its rows say the same, null is right where no help is needed, and traces offer tasks where it is."""
    train, test, traces = simulate(seed)
    needed: dict[tuple[Event, ...], bool] = {}
    for row in train + test:
        assert row.help_needed is not None
        assert needed.setdefault(row.history, row.help_needed) is row.help_needed
        assert row.proposal is not None or row.accepted is not row.help_needed
    for steps in traces.values():
        history: tuple[Event, ...] = ()
        for step in steps:
            history = (*history, step.observation)
            assert step.task_status is needed[history]
    probed = {probe.history: probe.help_needed for probe in probes(train + test)}
    assert probed == needed
    assert 0.3 < sum(needed.values()) / len(needed) < 0.7


def test_proposals_after_a_history_are_distinct(embedded: Corpus) -> None:
    assert len({(row.history_digest, row.proposal) for row in embedded.rows}) == len(embedded.rows)


def test_the_same_proposal_is_accepted_and_rejected_at_different_times(embedded: Corpus) -> None:
    verdicts: dict[tuple[str, str | None], set[bool]] = {}
    for row in embedded.rows:
        verdicts.setdefault((row.scene, row.proposal), set()).add(row.accepted)
    both = Counter(proposal is None for (_, proposal), seen in verdicts.items() if len(seen) == 2)
    assert min(both[True], both[False]) >= 20


def test_traces_are_those_of_the_test_rows(embedded: Corpus) -> None:
    longest: dict[Event, tuple[Event, ...]] = {}
    for row in sorted(embedded.test, key=lambda row: len(row.history)):
        longest[row.history[0]] = row.history
    assert len(embedded.traces) == len(longest)
    for steps in embedded.traces.values():
        assert tuple(step.observation for step in steps) == longest[steps[0].observation]
        assert all(step.task_status == bool(step.agent_response.candidate_task) for step in steps)


def test_data_can_be_learned_but_not_from_single_words(embedded: Corpus) -> None:
    """On scenes held out, word counts help little; which event meets which proposal does, not always."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def single_words(row: AnnotatedRow) -> list[str]:
        return [*" ".join(event.event for event in row.history).split(), *(row.proposal or "nothing").split()]

    def met_words(row: AnnotatedRow) -> list[str]:
        event, proposal = row.history[-1].event.split(), (row.proposal or "nothing").split()
        on_topic = len(set(proposal) & set(single_words(row)[: -len(proposal)]))
        return [f"{on_topic} shared", *(f"{one} meets {other}" for one in event for other in ["", *proposal])]

    split = split_by_scene(embedded, 5, 0)
    target, truth = ([row.accepted for row in rows] for rows in (split.train, split.test))
    majority = max(sum(truth), len(truth) - sum(truth)) / len(truth)
    scores = {}
    for words in (single_words, met_words):
        model = make_pipeline(CountVectorizer(analyzer=words, min_df=3), LogisticRegression(solver="liblinear", C=0.3))
        scores[words] = model.fit(split.train, target).score(split.test, truth)
    assert scores[single_words] < majority + 0.1
    assert majority + 0.1 < scores[met_words] < 0.95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_seed_gives_every_category_to_both_files(seed: int) -> None:
    train, test, _ = simulate(seed)
    assert {row.category for row in train} == {row.category for row in test} == set(Category)
