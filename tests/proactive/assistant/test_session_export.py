"""What a session becomes: traces, rows, conversations, preferences, and what the trace reader shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.json_records import read_jsonl
from datamodules.corpus.preferences import PreferenceRecord
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.traces import read_traces
from datamodules.errors import UserError
from proactive.annotation.trace_reader import read_sources
from proactive.assistant.assistant import SessionParts
from proactive.assistant.clock import ReplayClock
from proactive.assistant.deciding import Decision, Policy
from proactive.assistant.live_gate import GateVerdict
from proactive.assistant.observations import Presence
from proactive.assistant.session_export import export_sessions
from proactive.simulation.simulated_traces import read_simulated
from tests.helpers import conversations_of
from tests.proactive.assistant.sessions import (
    BEGIN,
    FREE,
    ListSource,
    TestNotices,
    decisions,
    event,
    happened,
    proposing,
    run,
)

PROPOSALS = ["yes", None, "no", "ignored", "weak", "yes", "late"]


async def gating(history: Any, proposal: str, number: int) -> GateVerdict:
    """Holds back what is weak."""
    weak = proposal == "weak"
    return GateVerdict(Decision.HELD_BACK if weak else Decision.SHOWN, 0.2 if weak else 0.8, 0.1 if weak else 1.0)


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """Two traces: the user is away for an hour before the last event."""
    folder, clock = tmp_path / "mine", ReplayClock()
    items = [happened(n) for n in range(1, 7)]
    later = BEGIN + 4000.0
    items += [Presence(True, BEGIN + 380.0, {"next": 7}), Presence(False, later, {"next": 8}), happened(9, 4001)]  # type: ignore[list-item]
    agent = proposing(*PROPOSALS)
    agent.recorded = {**agent.recorded, "a.json.2": agent.recorded["a.json"][6:]}
    notices = TestNotices({"yes": True, "no": False, "late": True})
    policy = Policy(pause=0, per_hour=99, expires=30)
    entries = run(folder, SessionParts(ListSource(items, clock), clock, agent, notices, policy, gating, 0.5, 9))
    assert decisions(entries) == ["shown", "silent", "shown", "shown", "held back", "repeated", "shown"]
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_made_of_answers_only(session: Path, tmp_path: Path) -> None:
    counts = export_sessions([session], tmp_path / "out")
    assert counts == {"traces": 2, "events": 7, "rows": 3, "preferences": 3}
    rows = read_jsonl(tmp_path / "out" / "reward_data" / "train_data.jsonl", AnnotatedRow)
    assert [(len(row.history), row.proposal, row.accepted) for row in rows] == [
        (1, "yes", True),
        (3, "no", False),
        (1, "late", True),
    ]
    assert rows[1].history == tuple(event(n) for n in (1, 2, 3))
    assert rows[0].scene == rows[1].scene != rows[2].scene
    provenance = lines(tmp_path / "out" / "provenance.jsonl")
    assert [(one["trace"], one["step"], one["session"], one["event"]) for one in provenance] == [
        ("session_001_trace_1", 0, "mine", 1),
        ("session_001_trace_1", 2, "mine", 3),
        ("session_001_trace_2", 0, "mine", 7),
    ]
    assert all((one["probability"], one["threshold"], one["propensity"]) == (0.8, 0.5, 1.0) for one in provenance)


def test_preferences_and_conversations_say_what_the_user_wanted(session: Path, tmp_path: Path) -> None:
    export_sessions([session], tmp_path / "out")
    pairs = lines(tmp_path / "out" / "preferences.jsonl")
    assert [(len(one["history"]), one["chosen"], one["rejected"], one["source"]) for one in pairs] == [
        (1, "yes", None, "live"),
        (3, None, "no", "live"),
        (1, "late", None, "live"),
    ]
    assert len(read_jsonl(tmp_path / "out" / "preferences.jsonl", PreferenceRecord)) == 3
    path = tmp_path / "out" / "conversations.jsonl"
    found = [one["conversations"] for one in lines(path)]
    assert [[turn["role"] for turn in one] for one in found] == [["system", "user", "assistant"]] * 2
    assert json.loads(found[0][2]["content"]) == {"proposal": "yes"}
    assert len(list(conversations_of(path))) == 2


def test_traces_open_in_the_reader_with_what_the_gate_held_back(session: Path, tmp_path: Path) -> None:
    export_sessions([session, session], tmp_path / "out")
    (source,) = read_sources([tmp_path / "out"])
    assert [trace.name for trace in source.traces] == [
        f"session_{session:03}_trace_{trace}" for session in (1, 2) for trace in (1, 2)
    ]
    steps = source.traces[0].steps
    assert [step.outcome for step in steps] == ["tp", "undecided", "fp", "undecided", "undecided", "undecided"]
    assert [step.offers[0].gate for step in steps] == [0.8, None, 0.8, 0.8, 0.2, 0.8]
    assert [step.offers[0].held_back for step in steps] == [False, False, False, False, True, True]
    assert steps[3].offers[0].notes == {"Decision": "shown", "Reply": "ignored"}
    (recorded,) = read_traces(tmp_path / "out" / "traces").values()
    assert [len(trace.events) for trace in recorded.traces] == [6, 1, 6, 1]
    assert {offer.proposal: accepted for offer, accepted in recorded.judgments.items()} == {
        "yes": True,
        "no": False,
        "late": True,
    }
    assert [len(steps) for steps in read_simulated(tmp_path / "out").values()] == [6, 1, 6, 1]


def test_without_answers_there_is_nothing_to_learn(tmp_path: Path) -> None:
    clock = ReplayClock()
    run(tmp_path / "mine", SessionParts(ListSource([happened(1)], clock), clock, proposing("x"), TestNotices(), FREE))
    with pytest.raises(UserError, match="no offer of these sessions was accepted or rejected"):
        export_sessions([tmp_path / "mine"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
