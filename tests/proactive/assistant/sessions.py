"""Sessions without models: sources, agents and notices that do what a test tells them."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.corpus.records import Event
from datamodules.corpus.traces import Candidate, Trace
from datamodules.errors import UserError
from models.judging.agents import RecordedAgent
from proactive.assistant.assistant import Assistant, SessionParts
from proactive.assistant.clock import Clock, ReplayClock
from proactive.assistant.deciding import Policy, Reply
from proactive.assistant.notices import Notices, Offer, OnAnswer, RecordedNotices
from proactive.assistant.observations import Cursor, Happened, Observation, Source
from proactive.assistant.session_log import SESSION_FILE, Entry, EventEntry, ReplyEntry, read_session
from proactive.assistant.trace_source import TraceSource

FREE = Policy(pause=0.0, per_hour=1000)  # every event may lead to an offer
BEGIN = 1_717_378_000


def event(number: int, second: float | None = None) -> Event:
    """Event `number`, from 1, a minute after the one before unless its second is given."""
    at = BEGIN + (60 * number if second is None else second)
    return Event(time=str(at), event=f"The user does step {number}.")


def happened(number: int, second: float | None = None) -> Happened:
    one = event(number, second)
    return Happened(one, float(one.time), {"next": number})


def trace(events: int) -> Trace:
    return Trace("a.json", tuple(event(n) for n in range(1, events + 1)), (False,) * events)


@dataclass
class ListSource(Source):
    """Yields observations; where a function stands instead of one, it is awaited."""

    items: Sequence[Observation | Callable[[], Any]]
    clock: Clock = field(default_factory=ReplayClock)
    name: str = "a.json"

    def describe(self) -> dict[str, Any]:
        return {"source": "list"}

    async def observations(self, cursor: Cursor | None = None) -> AsyncGenerator[Observation, None]:
        first = cursor["next"] if cursor else 0
        for item in self.items:
            if callable(item):
                await item()
            elif item.cursor["next"] > first:
                await self.clock.reach(item.at)
                yield item


@dataclass
class TestNotices(Notices):
    """Keeps what it shows. `reply` is what the user answers at once, by proposal."""

    __test__ = False

    replies: dict[str, bool] = field(default_factory=dict)
    shown: list[Offer] = field(default_factory=list)
    ended: list[tuple[int, Reply]] = field(default_factory=list)
    answered: OnAnswer = lambda number, accepted: None
    is_shown: asyncio.Event = field(default_factory=asyncio.Event)

    def running(self, answered: OnAnswer) -> AbstractAsyncContextManager[object]:
        self.answered = answered
        return nullcontext()

    async def show(self, offer: Offer) -> None:
        self.shown.append(offer)
        self.is_shown.set()
        if offer.proposal in self.replies:
            self.answered(offer.number, self.replies[offer.proposal])

    async def end(self, offer: Offer, reply: Reply) -> None:
        self.ended.append((offer.number, reply))


def proposing(*proposals: str | None) -> RecordedAgent:
    """An agent that makes these proposals, one after each event."""
    return RecordedAgent({"a.json": [[Candidate(one, one)] for one in proposals]}, "here")


def run(folder: Path, parts: SessionParts, settings: dict[str, Any] | None = None) -> list[Entry]:
    """Run a session to its end, and return all entries of its log."""
    asyncio.run(Assistant(parts).run(folder / SESSION_FILE, settings or {"name": "test"}))
    return list(read_session(folder)[1])


def replay(folder: Path, proposals: Sequence[str | None], judgments: dict[tuple[int, str], bool] | None = None,
           policy: Policy = FREE, **others: Any) -> list[Entry]:  # fmt: skip
    """Replay a trace with these proposals and answers."""
    clock = ReplayClock()
    source = TraceSource(trace(len(proposals)), clock)
    return run(
        folder, SessionParts(source, clock, proposing(*proposals), RecordedNotices(judgments or {}), policy, **others)
    )


def decisions(entries: Sequence[Entry]) -> list[str]:
    return [entry.decision.value for entry in entries if isinstance(entry, EventEntry)]


def replies(entries: Sequence[Entry]) -> list[tuple[int, str]]:
    return [(entry.number, entry.reply.value) for entry in entries if isinstance(entry, ReplyEntry)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / SESSION_FILE).read_text().splitlines()]


class FailingAgent(RecordedAgent):
    """Raises after the first event."""

    def __init__(self) -> None:
        super().__init__({}, "here")

    def session(self, name: str) -> Any:
        return FailingSession()


class FailingSession:
    def __init__(self) -> None:
        self.noted: list[Event] = []

    def note(self, event: Event) -> None:
        self.noted.append(event)

    async def observe(self, event: Event) -> list[Candidate]:
        self.note(event)
        if len(self.noted) == 1:
            raise UserError("the server is gone", "Start it.")
        return [Candidate(f"offer {len(self.noted)}")]
