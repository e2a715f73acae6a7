"""`python -m proactive.prefer`: pairs of judged answers, and what cannot give any."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.preferences import open_preferences, read_preferences
from datamodules.corpus.records import Event
from models.reporting.timeline import ShownOffer, ShownStep, ShownTrace, ShownTraces
from proactive import prefer

EVENTS = tuple(Event(time=str(number), event=f"Event {number}.") for number in range(2))


def evaluation(folder: Path, *steps: list[ShownOffer]) -> Path:
    trace = ShownTrace("t", EVENTS[: len(steps)], tuple(ShownStep(tuple(offers), "tp") for offers in steps))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "timeline.json").write_text(ShownTraces(notes=(), traces=(trace,)).model_dump_json())
    return folder


def offer(text: str | None, probability: float | None, **fields: Any) -> ShownOffer:
    verdict = None if probability is None else probability > 0.5
    return ShownOffer(text, verdict=verdict, probability=probability, **fields)


def pairs(path: Path) -> list[tuple[int, str | None, str | None]]:
    return [(len(one.history), one.chosen, one.rejected) for one in read_preferences(open_preferences(str(path)))]


def test_accepted_answers_are_preferred_to_rejected_ones(call: Callable[..., Any], tmp_path: Path) -> None:
    first = [offer("A", 0.9), offer("B", 0.2), offer(None, 0.6), offer("B", 0.2)]
    second = [offer("C", 0.9), offer("D", 0.8)]
    folder, output = evaluation(tmp_path / "evaluation", first, second), tmp_path / "preferences.jsonl"
    ended = call(prefer.main, folder, "--output", output)
    assert ended.code == 0
    assert "2 preferences after 1 histories" in ended.out
    assert pairs(output) == [(1, None, "B"), (1, "A", "B")] or pairs(output) == [(1, "A", "B"), (1, None, "B")]
    assert json.loads(output.read_text().splitlines()[0])["source"] == "evaluation evaluation"


def test_a_difference_of_probabilities_decides(call: Callable[..., Any], tmp_path: Path) -> None:
    folder, output = tmp_path / "e", tmp_path / "preferences.jsonl"
    evaluation(folder, [offer("A", 0.9), offer("B", 0.75), offer("C", 0.55)])
    assert call(prefer.main, folder, "--output", output, "--min-difference", "0.3").code == 0
    assert pairs(output) == [(1, "A", "C")]


def test_answers_that_were_not_judged_make_no_pair(call: Callable[..., Any], tmp_path: Path) -> None:
    steps = [offer("A", 0.9), offer("B", 0.2, held_back=True), offer("C", 0.1, parsed=False), offer("D", None)]
    output = tmp_path / "preferences.jsonl"
    ended = call(prefer.main, evaluation(tmp_path / "e", steps), "--output", output)
    assert (ended.code, output.exists()) == (2, False)
    assert "no two answers to prefer one of" in ended.err


@pytest.mark.parametrize("given", ["missing", "."])
def test_other_folders_are_refused(call: Callable[..., Any], tmp_path: Path, given: str) -> None:
    ended = call(prefer.main, tmp_path / given, "--output", tmp_path / "p.jsonl")
    assert ended.code == 2
    assert "timeline.json" in ended.err


def test_a_judge_without_probabilities_has_no_differences(call: Callable[..., Any], tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", [ShownOffer("A", verdict=True), ShownOffer("B", verdict=False)])
    ended = call(prefer.main, folder, "--output", tmp_path / "p.jsonl", "--min-difference", "0.1")
    assert ended.code == 2
    assert "gives no probabilities" in ended.err
    assert call(prefer.main, folder, "--output", tmp_path / "p.jsonl").code == 0
