"""Observations, and the interface of sources, which yield them in the order of their time.

To add a kind of source, write a class with the methods of `Source`, and add a branch to
`proactive.assistant.source_choice.read_source`.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from datamodules.corpus.records import Event

Cursor = Mapping[str, Any]  # JSON values only


@dataclass(frozen=True)
class Happened:
    """The user did something.

    Attributes:
        event: The event as it is logged and as models read it: one sentence, without private content.
        at: When it happened, in epoch seconds. Times of observations do not decrease.
        cursor: The position of the source after this observation. The session log stores both in one line. So a source
            that starts again with this cursor neither repeats nor loses an event.
    """

    event: Event
    at: float
    cursor: Cursor = field(default_factory=dict)


@dataclass(frozen=True)
class Presence:
    """The user went away from the computer or came back; see `Happened` for the other fields."""

    away: bool
    at: float
    cursor: Cursor = field(default_factory=dict)


@dataclass(frozen=True)
class Gap:
    """Nothing is known of the time from `since` to `at`, for example because a server was not reachable."""

    since: float
    at: float
    reason: str
    cursor: Cursor = field(default_factory=dict)


Observation = Happened | Presence | Gap


class Source(Protocol):
    """Yields observations."""

    @property
    def name(self) -> str:
        """The name of its session: that of the trace, or a constant for a source that does not end."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the settings that determine its observations, as JSON. A session only continues with equal ones."""
        ...

    def observations(self, cursor: Cursor | None = None) -> AsyncGenerator[Observation, None]:
        """Yield observations, each when it is due.

        The caller closes the generator to end it, so resources belong into `async with` or `finally` inside it.

        Args:
            cursor: The cursor of the last observation that was logged; None for the beginning.

        Raises:
            UserError: The source cannot be read. A source that may come back waits, and yields a `Gap`.
        """
        ...
