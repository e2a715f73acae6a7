"""Recorded traces, judged traces, splits, and knowing a trace again."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.corpus.answers import Answer
from datamodules.corpus.json_records import validate
from datamodules.corpus.records import Event, PublishedStep, history_digest, scene_of
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.traces import (
    Candidate,
    ProposalKey,
    Trace,
    judged_steps,
    read_recorded,
    read_splits,
    root_traces,
    was_seen,
)
from datamodules.errors import UserError
from tests.datamodules.conftest import few_examples
from tests.helpers import PROACTIVEBENCH, needs_proactivebench

OPERATION = {"name": "open", "arguments": {"path": "a.txt"}}


def step(text: str, response: list[Any], **fields: Any) -> dict[str, Any]:
    return {
        "observation": {"time": "1", "event": text},
        "agent_response": response,
        "task_status": False,
        "other_infomation": {"Purpose": "p", "Thoughts": "t", "Response": "r"},
        **fields,
    }


def a_trace(*texts: str, name: str = "a.json") -> Trace:
    return Trace(name, tuple(Event(time="1", event=text) for text in texts), (False,) * len(texts))


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_recorded_traces_are_read_with_candidates_and_judgments(tmp_path: Path) -> None:
    steps = [
        step("a", ["Help."], judgement=[True]),
        step("b", [None], judgement=[False]),
        step("c", ["null"]),
        step("d", [], judgement=[]),
        step("e", [OPERATION, None, "x"], judgement=[False, True, True]),
    ]
    recorded = read_recorded(write(tmp_path, one=steps, splits={"all": {"files": ["one.json"]}}))
    (trace,) = recorded.traces
    assert (trace.name, [event.event for event in trace.events]) == ("one.json", list("abcde"))
    operation = json.dumps(OPERATION)
    assert [[c.proposal for c in candidates] for candidates in recorded.answers["one.json"]] == [
        ["Help."],
        [None],
        [None],
        [None],
        [operation, None, "x"],
    ]
    assert recorded.judgments == {
        ProposalKey("one.json", 0, "Help."): True,
        ProposalKey("one.json", 1, None): False,
        ProposalKey("one.json", 4, operation): False,
        ProposalKey("one.json", 4, None): True,
        ProposalKey("one.json", 4, "x"): True,
    }


def test_a_step_without_response_has_no_judgment(tmp_path: Path) -> None:
    """The published scoring does not count it either."""
    assert read_recorded(write(tmp_path, one=[step("a", [], judgement=[True])])).judgments == {}


def test_judged_steps_have_the_published_fields(tmp_path: Path) -> None:
    notes = {"Purpose": "p", "extra": [1]}
    decided = [
        (Candidate("Help.", "Help.", notes), True),
        (Candidate(None, None), False),
        (Candidate(json.dumps(OPERATION), OPERATION), None),
    ]
    steps = judged_steps(a_trace("a", "b", "c"), decided)
    assert steps == [
        {
            "observation": {"time": "1", "event": "a"},
            "agent_response": ["Help."],
            "task_status": False,
            "judgement": [True],
            "other_infomation": notes,
        },
        {
            "observation": {"time": "1", "event": "b"},
            "agent_response": [None],
            "task_status": False,
            "judgement": [False],
            "other_infomation": {},
        },
        {
            "observation": {"time": "1", "event": "c"},
            "agent_response": [OPERATION],
            "task_status": False,
            "judgement": [],
            "other_infomation": {},
        },
    ]
    assert all(validate(one, PublishedStep, "here") for one in steps)
    again = read_recorded(write(tmp_path, a=steps))
    assert [[c.written for c in step] for step in again.answers["a.json"]] == [["Help."], [None], [OPERATION]]
    assert again.judgments == {ProposalKey("a.json", 0, "Help."): True, ProposalKey("a.json", 1, None): False}


def test_an_agents_answer_as_a_candidate() -> None:
    answer = Answer(purpose="p", proposal="Help.", response="r")
    assert Candidate.of(answer) == Candidate("Help.", "Help.", {"Purpose": "p", "Response": "r"})
    assert Candidate.of(Answer(proposal=None)) == Candidate(None)
    assert Candidate.of(None) == Candidate(None, parsed=False)


def test_splits_are_read_and_a_bad_one_is_named(tmp_path: Path) -> None:
    traces = [a_trace("a"), a_trace("b", name="b.json")]
    assert read_splits(None, traces)["all"].files == ("a.json", "b.json")
    good = write(tmp_path, good={"real": {"theme": "All", "files": ["a.json"]}, "some": {"files": []}}) / "good.json"
    splits = read_splits(good, traces)
    assert (splits["real"].theme, splits["real"].files, splits["some"].theme) == ("All", ("a.json",), None)
    for content, field in (
        ({"real": {"files": [1]}}, r"real, field files\[0\]"),
        ({"real": {}}, "real, field files"),
        ({"real": ["a.json"]}, "real: "),
        ({"real": {"files": ["a"], "them": "x"}}, "real, field them"),
        ([], "expected a JSON object"),
    ):
        path = write(tmp_path, bad=content) / "bad.json"
        with pytest.raises(UserError, match=f"bad.json(, |: ){field}"):
            read_splits(path, traces)


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no recorded traces"):
        read_recorded(tmp_path)


def test_a_trace_was_seen_if_its_scene_or_a_history_was() -> None:
    trace, other_cut = a_trace("a", "b", "c"), a_trace("A", "b", "c")
    scenes, histories = {scene_of(trace.events)}, {history_digest(trace.history(1))}
    assert was_seen(trace, None, scenes, ())
    assert was_seen(trace, None, None, histories)
    assert was_seen(trace, None, (), histories)
    assert not was_seen(other_cut, None, scenes, histories)
    assert was_seen(other_cut, trace, scenes, ())  # the session of that name was trained on
    assert was_seen(other_cut, trace, None, histories)
    assert not was_seen(trace, other_cut, {"other"}, {1})


EVENTS = st.lists(st.sampled_from("abc"), min_size=1, max_size=5)


@few_examples
@given(EVENTS, EVENTS)
def test_a_trace_was_seen_if_any_of_its_histories_was(mine: list[str], other: list[str]) -> None:
    trace, trained = a_trace(*mine), a_trace(*other)
    for step_number in range(len(trained.events)):
        history = trained.history(step_number)
        expected = any(trace.history(number) == history for number in range(len(trace.events)))
        assert was_seen(trace, None, None, {history_digest(history)}) is expected


@needs_proactivebench
def test_recorded_traces_are_excerpts_of_the_roots_traces() -> None:
    corpus = load_corpus(str(PROACTIVEBENCH))
    own = {trace.name: trace for trace in root_traces(corpus)}
    assert set(read_splits(corpus.splits_file, list(own.values()))["real_average"].files) == set(own)
    scenes = {row.scene for row in corpus.rows}
    recorded = read_recorded(PROACTIVEBENCH / "traces" / "gpt-4o")
    assert sum(len(trace.events) for trace in recorded.traces) == 227
    assert not recorded.judgments
    assert any(scene_of(trace.events) not in scenes for trace in recorded.traces)  # a first event that was changed
    assert all(was_seen(trace, own[trace.name], scenes, ()) for trace in recorded.traces)
