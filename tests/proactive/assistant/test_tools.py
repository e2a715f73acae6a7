"""Accepted offers: drafts, tools that are allowed, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.corpus.traces import Candidate
from models.judging.agents import RecordedAgent
from proactive.assistant.assistant import SessionParts
from proactive.assistant.clock import ReplayClock
from proactive.assistant.session_log import ActionEntry, Entry
from proactive.assistant.tools import ToolCall, act, call_of
from proactive.assistant.trace_source import TraceSource
from tests.proactive.assistant.sessions import FREE, TestNotices, lines, replies, run, trace

ALLOWED = ("save_draft",)


def asking(name: str = "reply.txt", **others: Any) -> str:
    return json.dumps({"tool": "save_draft", "arguments": {"name": name, "text": "Dear Ada", **others}})


@given(st.text() | st.dictionaries(st.text(), st.none() | st.text() | st.integers()).map(json.dumps))
def test_whatever_is_no_call_is_a_draft(response: str) -> None:
    assert call_of(response) is None


def test_a_call_is_a_tool_with_arguments() -> None:
    assert call_of(f" {asking()}\n") == ToolCall(tool="save_draft", arguments={"name": "reply.txt", "text": "Dear Ada"})
    assert call_of('{"tool": "a", "arguments": {}, "more": 1}') is None
    assert call_of("[" * 5000) is None
    assert call_of('{"tool": ' * 5000) is None


@pytest.mark.parametrize(
    ("response", "allowed", "outcome", "said"),
    [
        (asking(), ALLOWED, "done", "reply.txt is written"),
        (asking(), (), "refused", "the tool save_draft is not allowed"),
        ('{"tool": "rm", "arguments": {}}', (*ALLOWED, "rm"), "refused", "the tool rm is not allowed"),
        (asking("../reply.txt"), ALLOWED, "refused", "the arguments of save_draft"),
        (asking("/tmp/reply.txt"), ALLOWED, "refused", "the arguments of save_draft"),
        (asking(".."), ALLOWED, "refused", "the arguments of save_draft"),
        (asking("a\n"), ALLOWED, "refused", "the arguments of save_draft"),
        (asking(text=3), ALLOWED, "refused", "the arguments of save_draft"),
        (asking(mode="x"), ALLOWED, "refused", "the arguments of save_draft"),
        (asking(text="x" * 100_001), ALLOWED, "refused", "the arguments of save_draft"),
    ],
)
def test_only_allowed_tools_run_and_only_with_valid_arguments(
    response: str, allowed: tuple[str, ...], outcome: str, said: str, tmp_path: Path
) -> None:
    call = call_of(response)
    assert call is not None
    found, what = act(call, allowed, tmp_path / "session")
    assert (found, said in what) == (outcome, True), what
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    expected = [tmp_path / "session" / "drafts" / "reply.txt"] if outcome == "done" else []
    assert written == expected
    if expected:
        assert expected[0].read_text() == "Dear Ada"
        assert act(call, allowed, tmp_path / "session") == ("failed", f"{expected[0]} exists")


def test_a_draft_that_cannot_be_written_has_failed(tmp_path: Path) -> None:
    (tmp_path / "drafts").touch()
    call = call_of(asking())
    assert call is not None
    outcome, what = act(call, ALLOWED, tmp_path)
    assert (outcome, "drafts" in what) == ("failed", True)


def session(
    folder: Path, response: str, accepts: bool | None, tools: tuple[str, ...]
) -> tuple[list[Entry], TestNotices]:
    notices, clock = TestNotices({} if accepts is None else {"Help.": accepts}), ReplayClock()
    agent = RecordedAgent({"a.json": [[Candidate("Help.", "Help.", {"Response": response})]]}, "here")
    parts = SessionParts(TraceSource(trace(1), clock), clock, agent, notices, FREE, tools=tools)
    return run(folder, parts), notices


@pytest.mark.parametrize(("accepts", "reply"), [(True, "accepted"), (False, "rejected"), (None, "ignored")])
def test_a_tool_runs_after_acceptance_only(accepts: bool | None, reply: str, tmp_path: Path) -> None:
    entries, notices = session(tmp_path, asking(), accepts, ALLOWED)
    assert replies(entries) == [(1, reply)]
    actions = [entry for entry in entries if isinstance(entry, ActionEntry)]
    assert [(one.number, one.tool, one.outcome) for one in actions] == ([(1, "save_draft", "done")] if accepts else [])
    assert (tmp_path / "drafts" / "reply.txt").exists() is bool(accepts)
    assert [one.draft for one in notices.shown] == [""]
    before = lines(tmp_path)
    session(tmp_path, asking(), accepts, ALLOWED)
    assert lines(tmp_path) == before, "a session that has ended does nothing again"


def test_a_draft_is_part_of_its_offer(tmp_path: Path) -> None:
    entries, notices = session(tmp_path, "Dear Ada", True, ALLOWED)
    assert [one.draft for one in notices.shown] == ["Dear Ada"]
    assert not [entry for entry in entries if isinstance(entry, ActionEntry)]
