"""Times of events for display: clock times, and the gap since the previous event."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from datamodules.corpus.records import Event

_WORDS = re.compile(r"Day (\d{1,4}), (\d{1,2}):(\d{2}) (AM|PM)")  # the other form of times in published rows
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Moment:
    """An event with its clock time, its full time, and the gap since the previous event, empty if unknown."""

    event: str
    clock: str
    time: str
    gap: str


def moments(events: Sequence[Event]) -> list[Moment]:
    """Convert the events of a session, in order. Epoch seconds are shown in UTC, because time zones are unknown."""
    found: list[Moment] = []
    before: tuple[bool, float] | None = None
    for event in events:
        now = _seconds(event.time)
        clock = time = event.time
        if now is not None and now[0]:
            moment = datetime.fromtimestamp(now[1], UTC)
            clock, time = f"{moment:%H:%M:%S}", f"{moment:%Y-%m-%d %H:%M:%S} UTC"
        gap = _gap(now[1] - before[1]) if now and before and now[0] == before[0] else ""
        found.append(Moment(event.event, clock, time, gap))
        before = now
    return found


def seconds_of(time: str) -> float | None:
    """Return the seconds of an event's time, since 1970 or since the first day of its words; None for other words."""
    found = _seconds(time)
    return None if found is None else found[1]


def _seconds(time: str) -> tuple[bool, float] | None:
    """Return whether a time is epoch seconds, and the number of seconds; None for unknown words."""
    if found := _WORDS.fullmatch(time):
        day, hour, minute = int(found[1]), int(found[2]), int(found[3])
        return False, float((day * 24 + hour % 12 + 12 * (found[4] == "PM")) * 3600 + minute * 60)
    try:
        seconds = float(time)
        datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return True, seconds


def _gap(seconds: float) -> str:
    """Format a gap in its two greatest units, such as +1 h 5 min."""
    sign, rest = "−" if seconds < 0 else "+", abs(seconds)
    if rest < 10:
        return f"{sign}{rest:.1f} s".replace(".0 s", " s")
    parts: list[str] = []
    rest = round(rest)
    for size, unit in _UNITS:
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return sign + " ".join(part for part in parts[:2] if part)
