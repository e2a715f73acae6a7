"""A session from its observations to its log: what is asked, shown, ended, and how it continues after a kill."""

import asyncio
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from datamodules.corpus.records import Event
from datamodules.errors import UserError
from proactive.assistant.assistant import Assistant, SessionParts
from proactive.assistant.clock import ReplayClock, SystemClock
from proactive.assistant.deciding import Decision, Policy
from proactive.assistant.live_gate import GateVerdict
from proactive.assistant.model_thread import ModelThread
from proactive.assistant.observations import Gap, Presence
from proactive.assistant.session_log import SESSION_FILE, EventEntry, read_session
from proactive.assistant.session_state import LONG_ABSENCE, SessionState
from tests.patience import HANG
from tests.proactive.assistant.sessions import (
    BEGIN,
    FREE,
    FailingAgent,
    ListSource,
    TestNotices,
    decisions,
    happened,
    lines,
    proposing,
    replay,
    replies,
    run,
)


def test_every_event_is_logged_with_what_came_of_it(tmp_path: Path) -> None:
    entries = replay(tmp_path, ["x", None, "y", "x", "z"], {(1, "x"): True, (3, "y"): False})
    assert decisions(entries) == ["shown", "silent", "shown", "repeated", "shown"]
    assert replies(entries) == [(1, "accepted"), (3, "rejected"), (5, "ignored")]
    events = [entry for entry in entries if isinstance(entry, EventEntry)]
    assert [(one.number, one.at, one.now, one.proposal) for one in events] == [
        (n, BEGIN + 60 * n, BEGIN + 60 * n, proposal) for n, proposal in enumerate(["x", None, "y", "x", "z"], 1)
    ]
    assert all(one.agent_seconds is not None for one in events)
    assert stat.S_IMODE((tmp_path / SESSION_FILE).stat().st_mode) == 0o600


def test_pauses_and_budget_hold_along_a_trace(tmp_path: Path) -> None:
    offers = [f"offer {n}" for n in range(8)]
    entries = replay(tmp_path, offers, {(1, "offer 0"): False}, Policy(pause=90, per_hour=2, expires=30))
    assert decisions(entries) == [
        "shown",
        *["cooling down"] * 2,  # 180 seconds after a rejection at second 60
        "shown",
        *["cooling down"] * 3,  # ignored 30 seconds later, and the rejection still counts
        "hourly budget used",
    ]
    assert replies(entries) == [(1, "rejected"), (4, "ignored")]


def test_an_absence_or_a_gap_withdraws_an_offer(tmp_path: Path) -> None:
    items = [
        happened(1, 0),
        Presence(True, BEGIN + 1.0, {"next": 2}),
        happened(3, 2),
        Presence(False, BEGIN + 3.0, {"next": 4}),
        happened(5, 4),
        Gap(BEGIN + 4.0, BEGIN + 5.0, "the server was away", {"next": 6}),
        happened(7, 6),
    ]
    clock = ReplayClock()
    parts = SessionParts(ListSource(items, clock), clock, proposing("a", "b", "c", "d"), TestNotices(), FREE)
    entries = run(tmp_path, parts)
    assert decisions(entries) == ["shown", "away", "shown", "shown"]
    assert replies(entries) == [(1, "withdrawn"), (3, "withdrawn"), (4, "ignored")]
    assert [entry.kind for entry in entries] == [
        *("event", "reply", "presence", "event", "presence", "event", "reply", "gap", "event", "reply")
    ]


@pytest.mark.parametrize(("seconds", "histories"), [(LONG_ABSENCE - 1, [1, 2]), (LONG_ABSENCE, [1, 1])])
def test_a_long_absence_begins_a_new_trace(seconds: float, histories: list[int], tmp_path: Path) -> None:
    seen: list[int] = []

    async def gating(history: Sequence[Event], proposal: str, number: int) -> GateVerdict:
        seen.append(len(history))
        return GateVerdict(Decision.SHOWN, 0.9, 1.0)

    later = BEGIN + 10 + seconds
    items = [
        happened(1, 0),
        Presence(True, BEGIN + 10.0, {"next": 2}),
        Presence(False, later, {"next": 3}),
        happened(4, 11 + seconds),
    ]
    clock, agent = ReplayClock(), proposing("a", "b")
    agent.recorded = {**agent.recorded, "a.json.2": [[*agent.recorded["a.json"][1]]]}
    parts = SessionParts(ListSource(items, clock), clock, agent, TestNotices(), FREE, gating, 0.5, 10)
    assert decisions(run(tmp_path, parts)) == ["shown", "shown"]
    assert seen == histories


def test_an_agent_that_fails_is_logged_and_rests(tmp_path: Path) -> None:
    clock = ReplayClock()
    items = [happened(n) for n in range(1, 5)]
    parts = SessionParts(ListSource(items, clock), clock, FailingAgent(), TestNotices(), Policy(pause=100, per_hour=9))
    entries = run(tmp_path, parts)
    assert decisions(entries) == ["agent failed", "cooling down", "shown", "cooling down"]
    (failed,) = [one for one in entries if isinstance(one, EventEntry) and one.decision == Decision.AGENT_FAILED]
    assert failed.error == "the server is gone"


def test_answers_and_expiry_come_while_nothing_happens(tmp_path: Path) -> None:
    """With real time: the source waits for the offers to end."""
    notices = TestNotices()

    async def answer() -> None:
        await notices.is_shown.wait()
        notices.answered(99, True)  # of another offer
        notices.answered(1, True)
        notices.answered(1, False)  # too late

    async def expire() -> None:
        while len(notices.ended) < 2:
            await asyncio.sleep(0.01)

    parts = SessionParts(
        ListSource([happened(1), answer, happened(2), expire, happened(3)], SystemClock()),
        SystemClock(),
        proposing("a", "b", None),
        notices,
        Policy(pause=0, per_hour=9, expires=0.2),
    )
    entries = run(tmp_path, parts)
    assert decisions(entries) == ["shown", "shown", "silent"]
    assert replies(entries) == [(1, "accepted"), (2, "ignored")]


def test_what_the_user_has_left_behind_is_not_offered(tmp_path: Path) -> None:
    """While the agent is asked about the first event, two more happen."""
    notices, agent = TestNotices(), proposing("a", "b", "c")
    came = asyncio.Event()

    class SlowSession:
        def __init__(self) -> None:
            self.inner = agent.session("a.json")
            self.note = self.inner.note

        async def observe(self, event: Event) -> list:
            await came.wait()
            return await self.inner.observe(event)

    agent.session = lambda name: SlowSession() if name == "slow" else type(agent).session(agent, name)  # type: ignore[method-assign]

    async def all_came() -> None:
        came.set()

    source = ListSource([happened(1), happened(2), happened(3), all_came], SystemClock(), "slow")
    parts = SessionParts(source, SystemClock(), agent, notices, Policy(pause=0, per_hour=9, moved_on=2, expires=0.05))
    entries = run(tmp_path, parts)
    assert decisions(entries) == ["outdated", "shown", "an offer is open"]
    assert [offer.proposal for offer in notices.shown] == ["b"]


def test_events_come_in_while_a_local_model_computes(tmp_path: Path) -> None:
    """The agent blocks its thread until the source has yielded three more events."""
    came = threading.Event()
    agent = proposing("a", "b", "c", "d")

    class BlockingSession:
        def __init__(self) -> None:
            self.inner = type(agent).session(agent, "a.json")
            self.note = self.inner.note

        async def observe(self, event: Event) -> list:
            assert came.wait(HANG), "the event loop waits for the model"
            return await self.inner.observe(event)

    agent.session = lambda name: BlockingSession()  # type: ignore[method-assign, assignment, return-value]

    async def all_came() -> None:
        came.set()

    source = ListSource([*(happened(n) for n in range(1, 5)), all_came], SystemClock())
    policy = Policy(pause=0, per_hour=9, moved_on=2, expires=0.05)
    parts = SessionParts(source, SystemClock(), agent, TestNotices(), policy, run_agent=ModelThread().run)
    assert decisions(run(tmp_path, parts)) == ["outdated", "outdated", "shown", "an offer is open"]


def test_a_source_that_fails_ends_the_session_with_its_error(tmp_path: Path) -> None:
    async def fail() -> None:
        raise UserError("the file is damaged", "Mend it.")

    clock, notices = ReplayClock(), TestNotices()
    with pytest.raises(UserError, match="the file is damaged"):
        run(tmp_path, SessionParts(ListSource([happened(1), fail], clock), clock, proposing("a"), notices, FREE))
    entries = list(read_session(tmp_path)[1])
    assert (decisions(entries), replies(entries)) == (["shown"], [(1, "withdrawn")])


def test_a_session_that_is_stopped_withdraws_its_offer(tmp_path: Path) -> None:
    notices = TestNotices()

    async def stopped() -> None:
        source = ListSource([happened(1), asyncio.Event().wait], SystemClock())
        parts = SessionParts(source, SystemClock(), proposing("a"), notices, FREE)
        running = asyncio.create_task(Assistant(parts).run(tmp_path / SESSION_FILE, {}))
        await notices.is_shown.wait()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(stopped())
    assert replies(list(read_session(tmp_path)[1])) == [(1, "withdrawn")]


OFFERS = ["x", None, "y", "x", "z", "v", "w", None, "u", "t"]
JUDGMENTS = {(1, "x"): True, (3, "y"): False, (6, "v"): False, (9, "u"): True}
STRICT = Policy(pause=50, per_hour=4, expires=100, moved_on=3)


@pytest.mark.parametrize("policy", [FREE, STRICT])
def test_killed_after_any_line_or_in_the_middle_of_one_it_continues(policy: Policy, tmp_path: Path) -> None:
    """Each event stands in the log once; an offer whose answer was lost is withdrawn; the rest follows from that."""
    whole = replay(tmp_path / "whole", OFFERS, JUDGMENTS, policy)
    content = (tmp_path / "whole" / SESSION_FILE).read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for number, end in enumerate(ends[:-1]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / SESSION_FILE).write_bytes(content[: end + 7])  # and the beginning of the next line
        entries = replay(folder, OFFERS, JUDGMENTS, policy)
        assert [one.number for one in entries if isinstance(one, EventEntry)] == list(range(1, 11))
        shown = [one.number for one in entries if isinstance(one, EventEntry) and one.decision == Decision.SHOWN]
        assert [number for number, _ in replies(entries)] == shown, "each offer ends once"
        before = whole[:number]
        open_offers = shown[: decisions(before).count("shown")][len(replies(before)) :]
        assert entries[:number] == before
        if open_offers:
            assert replies(entries)[len(replies(before))] == (open_offers[0], "withdrawn")
        else:
            assert decisions(entries) == decisions(whole)
            assert replies(entries) == replies(whole)


def test_the_state_follows_from_the_log(tmp_path: Path) -> None:
    clock = ReplayClock()
    items = [happened(1), Presence(True, BEGIN + 70.0, {"next": 2}), Presence(False, BEGIN + 5000.0, {"next": 3})]
    items += [happened(n, 5000 + 60 * n) for n in range(4, 30)]
    agent = proposing(*map(str, range(30)))
    agent.recorded = {**agent.recorded, "a.json.2": agent.recorded["a.json"]}
    notices = TestNotices({"3": True})
    assistant = Assistant(SessionParts(ListSource(items, clock), clock, agent, notices, STRICT, window=4))
    asyncio.run(assistant.run(tmp_path / SESSION_FILE, {}))
    again = SessionState(agent, "a.json", STRICT, 4)
    for entry in read_session(tmp_path)[1]:
        again.resume(entry)
    ran = assistant.state
    for name in ("watch", "history", "number", "cursor", "offer", "latest"):
        assert getattr(again, name) == getattr(ran, name), name
    assert again.agent_session.step == ran.agent_session.step == 26


def test_other_settings_or_a_changed_log_are_refused(tmp_path: Path) -> None:
    replay(tmp_path, ["x", "y"], {(1, "x"): True})
    clock = ReplayClock()
    parts = SessionParts(ListSource([], clock), clock, proposing(), TestNotices(), FREE)
    with pytest.raises(UserError, match="was started with name test, and now it is other"):
        run(tmp_path, parts, {"name": "other"})
    path = tmp_path / SESSION_FILE
    path.write_text(path.read_text().replace('"decision": "shown"', '"decision": "cooling down"', 1))
    with pytest.raises(UserError, match="is not the log of a live session"):
        run(tmp_path, parts)
    assert len(lines(tmp_path)) == 5
