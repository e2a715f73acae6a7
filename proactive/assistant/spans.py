"""Reads what ActivityWatch recorded, in responses of its server or in exports, into spans without private content.

The type of a bucket decides how it is read, not its name. Other modules get only spans. So each text of a recording
has passed `proactive.assistant.privacy` before other code sees it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from pydantic import AwareDatetime, BaseModel, Field, TypeAdapter, ValidationError

from datamodules.errors import UserError
from proactive.assistant.privacy import PrivacyOptions, address, redacted

WINDOW, EDITOR, PRESENCE, TAB, INPUT = (
    "currentwindow",
    "app.editor.activity",
    "afkstatus",
    "web.tab.current",
    "os.hid.input",
)
TYPES = {  # what each type of bucket tells
    WINDOW: "windows",
    EDITOR: "files in editors",
    PRESENCE: "whether the user is there",
    TAB: "tabs of browsers",
    INPUT: "whether the user is there, if nothing of type afkstatus is recorded",
}
AWAY_AFTER = 180.0  # seconds without input after which the user is away, as in ActivityWatch's own watcher
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Window:
    """An application in front, with the title of its window."""

    app: str
    title: str


@dataclass(frozen=True, slots=True)
class Tab:
    """The tab of a browser. The title of a private tab is only used to find its window."""

    title: str
    address: str | None
    private: bool


@dataclass(frozen=True, slots=True)
class Edited:
    """A file in an editor."""

    project: str
    file: str


@dataclass(frozen=True, slots=True)
class Status:
    """Whether the user is away."""

    away: bool


@dataclass(frozen=True, slots=True)
class Span:
    """A recorded event.

    Attributes:
        start: Epoch seconds.
        end: Epoch seconds; the end of an event that still goes on is that of its latest heartbeat.
        content: What was recorded; None if it is left out.
    """

    start: float
    end: float
    content: Window | Tab | Edited | Status | None


class RecordedEvent(BaseModel):
    """An event of a bucket. Its id is not read: exports have none."""

    timestamp: AwareDatetime
    duration: Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]  # seconds; cutting can make it negative
    data: dict[str, Any]


class Bucket(BaseModel):
    """A bucket in the list of a server."""

    type: str


class ExportedBucket(Bucket):
    """A bucket in an export."""

    events: list[RecordedEvent]


class Export(BaseModel):
    """The file of an export."""

    buckets: dict[str, ExportedBucket]


BUCKETS = TypeAdapter(dict[str, Bucket])
EVENTS = TypeAdapter(list[RecordedEvent])
EXPORT = TypeAdapter(Export)


def validated(text: str | bytes, reader: TypeAdapter[Read], where: str, hint: str) -> Read:
    """Read JSON. A message names the field, but shows nothing of the text, which may be private.

    Raises:
        UserError: The text does not fit; the message begins with `where`.
    """
    try:
        return reader.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}{f', field {field}' if field else ''}: {first['msg']}", hint) from None


def kinds_of(buckets: Mapping[str, Bucket]) -> dict[str, str]:
    """Return the types of the buckets that are read. Input is not, if presence is recorded."""
    known = {name: bucket.type for name, bucket in buckets.items() if bucket.type in TYPES}
    return {name: kind for name, kind in known.items() if kind != INPUT or PRESENCE not in known.values()}


def spans(kind: str, events: Iterable[RecordedEvent], privacy: PrivacyOptions) -> list[Span]:
    """Read the events of a bucket.

    Args:
        kind: The type of the bucket, one of `TYPES`.
        events: Its events in any order.
        privacy: What is left out.

    Returns:
        The spans in the order of their start. A bucket records one thing at a time. So if several events start at the
        same time, only the longest counts. Late heartbeats can cause such events, and a server can give an event's id
        to another event, so ids do not identify them.
    """
    read = _READERS[kind]
    found: dict[float, Span] = {}
    for event in events:
        start = event.timestamp.timestamp()
        end = start + max(event.duration, 0.0)
        if start not in found or end > found[start].end:
            found[start] = Span(start, end, read(event.data, privacy))
    ordered = [found[start] for start in sorted(found)]
    return _presence_of_input(ordered) if kind == INPUT else ordered


def clipped(found: Iterable[Span], since: float) -> list[Span]:
    """Cut off the parts of spans before a time. Some servers already do this."""
    return [replace(span, start=max(span.start, since)) for span in found if span.end >= since]


def _window(data: dict[str, Any], privacy: PrivacyOptions) -> Window | None:
    app, title = _text(data, "app"), _text(data, "title")
    return None if not app or privacy.is_private(app, title) else Window(redacted(app), redacted(title))


def _tab(data: dict[str, Any], privacy: PrivacyOptions) -> Tab:
    url, title = _text(data, "url"), _text(data, "title")
    private = data.get("incognito") not in (None, False) or privacy.is_private("", title, url)
    return Tab(redacted(title), None if private else address(url), private)


def _edited(data: dict[str, Any], privacy: PrivacyOptions) -> Edited | None:
    file, project = _text(data, "file"), _text(data, "project")
    if not file or privacy.is_private("", file, project):
        return None
    return Edited("" if project == "unknown" else redacted(_last_part(project)), redacted(_last_part(file)))


def _status(data: dict[str, Any], privacy: PrivacyOptions) -> Status:
    return Status(data.get("status") == "afk")


def _input(data: dict[str, Any], privacy: PrivacyOptions) -> Status | None:
    """Whether there was input. Keys and movements are not read."""
    return Status(False) if any(data.values()) else None


_READERS = {WINDOW: _window, TAB: _tab, EDITOR: _edited, PRESENCE: _status, INPUT: _input}


def _presence_of_input(ordered: list[Span]) -> list[Span]:
    """Add a span in which the user is away for each long time between two inputs."""
    found: list[Span] = []
    last: Span | None = None
    for span in ordered:
        if span.content is None:
            continue
        if last is not None and span.start - last.end > AWAY_AFTER:
            found.append(Span(last.end, span.start, Status(True)))
        found.append(span)
        last = span
    if last is not None and ordered[-1].end - last.end > AWAY_AFTER:  # no input so far
        found.append(Span(last.end, ordered[-1].end, Status(True)))
    return found


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    return value.strip() if isinstance(value, str) else ""


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
