"""ActivityWatch as a source of observations: a running server, or the file of an export."""

import hashlib
import logging
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from datamodules.corpus.records import Event
from datamodules.errors import UserError
from datamodules.files.reading import read_text
from proactive.assistant.activitywatch_client import ADDRESS_HINT, ActivityWatchClient, UnreachableError
from proactive.assistant.clock import Clock
from proactive.assistant.observations import Cursor, Gap, Happened, Observation, Presence, Source
from proactive.assistant.privacy import PrivacyOptions
from proactive.assistant.span_sequence import MAX_PAUSE, BucketCursor, BucketStep, Recording, emit
from proactive.assistant.spans import EXPORT, TYPES, kinds_of, spans, validated

POLL_INTERVAL = 2.0  # seconds between requests
LATENESS = 5.0  # seconds that a heartbeat may take to the server; the slowest watcher sends one every 5 seconds
SETTLING = 15.0  # seconds after an outage in which watchers send what they kept; they try again every 10 seconds
MAX_CATCH_UP = 3600.0  # seconds before a restart that are still reported
MAX_BACKOFF = 30.0  # seconds between tries to reach the server
MAX_EXPORT_BYTES = 256 * 2**20  # bytes of an export, which is kept in memory
UNREACHABLE = "the server was not reachable, and nothing was recorded"
log = logging.getLogger("proactive")


@dataclass
class _Progress:
    """What has been reported."""

    since: float  # the session reports what happened after this time
    at: float  # the time of the last observation
    buckets: dict[str, BucketCursor] = field(default_factory=dict)

    def cursor(self) -> Cursor:
        return {"since": self.since, "at": self.at, "buckets": {name: vars(one) for name, one in self.buckets.items()}}

    @classmethod
    def of(cls, cursor: Cursor) -> "_Progress":
        try:
            return TypeAdapter(cls).validate_python(dict(cursor))
        except ValidationError as error:
            raise UserError(
                "the session's log has a cursor that is not one of ActivityWatch", "Start a new session with --output."
            ) from error

    def gap(self, since: float, at: float, reason: str) -> Gap:
        self.at = max(self.at, at)
        return Gap(since, self.at, reason, self.cursor())

    def after(self, step: BucketStep) -> Observation | None:
        """Note that a step is reported. Return its observation; None if there is nothing to report."""
        self.buckets[step.bucket] = step.cursor
        if step.output is None:
            return None
        self.at = max(self.at, step.at)
        if isinstance(step.output, bool):
            return Presence(step.output, self.at, self.cursor())
        return Happened(Event(time=f"{self.at:.3f}", event=step.output), self.at, self.cursor())


class ActivityWatchSource(Source):
    """Reads the buckets of a server again and again, and yields what the user did.

    Each observation is yielded `LATENESS` seconds after it is known, so that an earlier one of another watcher can
    still arrive. Events that arrive later are left out, with a warning. Events before the first start are left out.

    Args:
        url: The address of the server.
        clock: The time of this machine.
        privacy: What is left out.

    Raises:
        UserError: This is not the address of a server.
    """

    def __init__(self, url: str, clock: Clock, privacy: PrivacyOptions) -> None:
        self.client = ActivityWatchClient(url, privacy)
        self.clock = clock

    @property
    def name(self) -> str:
        return "activitywatch"

    def describe(self) -> dict[str, Any]:
        return {"source": "activitywatch", "privacy": self.client.privacy.describe()}

    async def observations(self, cursor: Cursor | None = None) -> AsyncGenerator[Observation, None]:
        now = self.clock.now()
        progress = _Progress(now, now) if cursor is None else _Progress.of(cursor)
        if progress.at < now - MAX_CATCH_UP:
            left_at, since = progress.at, now - MAX_CATCH_UP
            progress = _Progress(since, since)
            yield progress.gap(left_at, since, "the assistant did not run")
        until = progress.at
        may_wait = cursor is not None
        outage: tuple[float, float] | None = None  # start and end of an outage whose events were not read yet
        async with self.client:
            while True:
                recording, was_away = await self._recording(progress, may_wait)
                may_wait, now = True, self.clock.now()
                if was_away:
                    outage = (outage[0] if outage else until, now)
                    await self.clock.reach(now + SETTLING)
                    continue
                until = max(until, now - LATENESS)
                for found in _observations(recording, progress, until, _holes(recording, outage)):
                    yield found
                outage = None
                await self.clock.reach(self.clock.now() + POLL_INTERVAL)

    async def _recording(self, progress: _Progress, may_wait: bool) -> tuple[Recording, bool]:
        """Read the buckets. Also return whether the server was not reachable at first."""
        delay = 0.0
        while True:
            try:
                recording = await self.client.recording(progress.since, progress.buckets)
            except UnreachableError as error:
                if not may_wait:
                    raise UserError(f"{self.client.url}: {error}", ADDRESS_HINT) from error
                if not delay:
                    log.warning(f"{self.client.url}: {error}; trying again until it comes back")
                delay = min(2 * delay or POLL_INTERVAL, MAX_BACKOFF)
                await self.clock.reach(self.clock.now() + delay)
            else:
                if delay:
                    log.warning(f"{self.client.url} is back")
                return recording, delay > 0


def _observations(
    recording: Recording, progress: _Progress, until: float, holes: Sequence[tuple[float, float]] = ()
) -> Iterator[Observation]:
    """Yield what is known until a time.

    Args:
        recording: The spans that were read.
        progress: What has been reported; it is updated.
        until: The time, in epoch seconds.
        holes: Times in which nothing was recorded.
    """
    left = list(holes)
    for step in emit(recording, progress.buckets, until):
        while left and step.at >= left[0][1]:
            yield progress.gap(*left.pop(0), UNREACHABLE)
        if (found := progress.after(step)) is not None:
            yield found
    for hole in left:
        yield progress.gap(*hole, UNREACHABLE)


def _holes(recording: Recording, outage: tuple[float, float] | None) -> list[tuple[float, float]]:
    """Return the times during an outage in which nothing was recorded.

    There may be none, because watchers send what they have kept after an outage.
    """
    if outage is None:
        return []
    recorded, end = outage
    holes = []
    ordered = sorted((span.start, span.end) for found in recording.spans.values() for span in found)
    for start, stop in [*ordered, (end, end)]:
        if min(start, end) - recorded > MAX_PAUSE:
            holes.append((recorded, min(start, end)))
        recorded = max(recorded, stop)
    return holes


class ExportSource(Source):
    """Yields what the user did during the time of an export: the same sentences as a live session of that time.

    Args:
        path: The file, as from /api/0/export or /api/0/buckets/NAME/export.
        clock: Decides when an observation is due.
        privacy: What is left out.

    Raises:
        UserError: The file is not an export.
    """

    def __init__(self, path: Path, clock: Clock, privacy: PrivacyOptions) -> None:
        hint = "Export it from ActivityWatch, for example from http://localhost:5600/api/0/export."
        text = read_text(path, MAX_EXPORT_BYTES, hint=hint)
        self._digest = hashlib.sha256(text.encode()).hexdigest()
        buckets = validated(text, EXPORT, str(path), hint).buckets
        del text  # text and events take most of the memory, so they are freed as soon as possible
        kinds = kinds_of(buckets)
        if not kinds:
            raise UserError(f"{path}: has no bucket of a known type ({', '.join(TYPES)})", hint)
        self.path = path
        self.clock = clock
        self.privacy = privacy
        found = {name: spans(kind, buckets.pop(name).events, privacy) for name, kind in kinds.items()}
        self.recording = Recording(found, kinds)

    @property
    def name(self) -> str:
        return self.path.name

    def describe(self) -> dict[str, Any]:
        return {"source": "export", "digest": self._digest, "privacy": self.privacy.describe()}

    async def observations(self, cursor: Cursor | None = None) -> AsyncGenerator[Observation, None]:
        progress = _Progress(0.0, 0.0) if cursor is None else _Progress.of(cursor)
        for found in _observations(self.recording, progress, math.inf):
            await self.clock.reach(found.at)
            yield found
