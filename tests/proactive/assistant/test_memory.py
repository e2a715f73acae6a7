"""A session that goes on and on needs no more memory."""

import asyncio
import tracemalloc
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from datamodules.corpus.records import Event
from datamodules.corpus.traces import Candidate
from models.judging.agents import RecordedAgent
from proactive.assistant.assistant import Assistant, SessionParts
from proactive.assistant.clock import ReplayClock
from proactive.assistant.deciding import Decision, Policy
from proactive.assistant.live_gate import GateVerdict
from proactive.assistant.observations import Cursor, Observation
from proactive.assistant.session_log import SESSION_FILE, Entry, EventEntry
from tests.proactive.assistant.sessions import ListSource, TestNotices, happened


class NumberedAgent(RecordedAgent):
    """Offers something else after each event."""

    def __init__(self) -> None:
        super().__init__({}, "here")

    def session(self, name: str) -> Any:
        return NumberedSession()


class NumberedSession:
    def __init__(self) -> None:
        self.step = 0

    def note(self, event: Event) -> None:
        self.step += 1

    async def observe(self, event: Event) -> list[Candidate]:
        self.note(event)
        return [Candidate(f"offer {self.step % 900} of a certain length, as offers have")]


class EndlessSource(ListSource):
    async def observations(self, cursor: Cursor | None = None) -> AsyncGenerator[Observation, None]:
        for number in range(1, 4001):
            one = happened(number, 5.0 * number)
            await self.clock.reach(one.at)
            yield one


def test_memory_does_not_grow_with_events(tmp_path: Path) -> None:
    sizes: dict[int, int] = {}
    notices = TestNotices({f"offer {n} of a certain length, as offers have": n % 3 == 0 for n in range(0, 900, 2)})

    async def gating(history: Sequence[Event], proposal: str, number: int) -> GateVerdict:
        return GateVerdict(Decision.SHOWN if number % 5 else Decision.HELD_BACK, 0.5, 1.0)

    def told(entry: Entry) -> None:
        notices.shown.clear()
        notices.ended.clear()
        if isinstance(entry, EventEntry) and entry.number in (1500, 4000):
            sizes[entry.number] = tracemalloc.get_traced_memory()[0]

    clock = ReplayClock()
    policy = Policy(pause=0, per_hour=1000, expires=20)
    parts = SessionParts(EndlessSource([], clock), clock, NumberedAgent(), notices, policy, gating, 0.5, 100, told)
    assistant = Assistant(parts)
    assistant.log._sync_file = lambda: None  # type: ignore[method-assign] - thousands of lines
    tracemalloc.start()
    try:
        asyncio.run(assistant.run(tmp_path / SESSION_FILE, {}))
    finally:
        tracemalloc.stop()
    assert assistant.state.number == 4000
    assert sizes[4000] - sizes[1500] < 64 * 1024, sizes
