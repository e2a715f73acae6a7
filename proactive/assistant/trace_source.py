"""A source that replays the events of a trace."""

from collections.abc import AsyncGenerator
from typing import Any

from datamodules.corpus.event_times import seconds_of
from datamodules.corpus.traces import Trace, traces_digest
from proactive.assistant.clock import Clock
from proactive.assistant.observations import Cursor, Happened, Observation, Source

UNKNOWN_GAP = 60.0  # seconds before an event whose time cannot be read


class TraceSource(Source):
    """Yields the events of a trace.

    Args:
        trace: The trace.
        clock: Decides when an event is due.
    """

    def __init__(self, trace: Trace, clock: Clock) -> None:
        self.trace = trace
        self.clock = clock

    @property
    def name(self) -> str:
        return self.trace.name

    def describe(self) -> dict[str, Any]:
        return {"source": "trace", "events": traces_digest([self.trace])}

    async def observations(self, cursor: Cursor | None = None) -> AsyncGenerator[Observation, None]:
        first = cursor["next"] if cursor else 0
        at: float | None = None
        for number, event in enumerate(self.trace.events):
            seconds = seconds_of(event.time)
            if at is None:
                at = 0.0 if seconds is None else seconds
            else:  # published times are not always in order
                at = at + UNKNOWN_GAP if seconds is None else max(at, seconds)
            if number >= first:
                await self.clock.reach(at)
                yield Happened(event, at, {"next": number + 1})
