"""session.jsonl, the log of a live session: each observation with the decision on it, and each reply.

Entries are written as soon as they are known. The first line contains the settings. Only the file's owner may read it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from datamodules.corpus.json_records import parse_json
from datamodules.corpus.records import Event, Proposal, Unicode
from datamodules.errors import UserError
from datamodules.files.append_log import AppendLog
from datamodules.files.reading import MAX_RECORDS_BYTES, open_file, text_lines
from proactive.assistant.deciding import Decision, Reply
from proactive.assistant.tools import Outcome

SESSION_FILE = "session.jsonl"
SESSION_HINT = "Give a folder that `python -m proactive.live` wrote."
Probability = Annotated[float, Field(ge=0, le=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class EventEntry(_Entry):
    """An event and what came of it.

    Attributes:
        number: The number of the event in the session, from 1.
        at: When it happened, in epoch seconds.
        now: When the assistant learned of it.
        decided: When the decision was made.
        event: The event.
        cursor: The cursor of the source after the event.
        decision: What came of it.
        proposal: The agent's proposal; None if it was silent or not asked.
        purpose, thoughts, response: The agent's notes; the response is the draft that is shown.
        probability: The gate's P(accepted).
        threshold: The gate's threshold.
        propensity: The probability that the offer was shown, given that the agent made it.
        agent_seconds, gate_seconds: The time that agent and gate took.
        error: Why agent or gate failed.
    """

    kind: Literal["event"] = "event"
    number: int
    at: float
    now: float
    decided: float
    event: Event
    cursor: dict[str, Any]
    decision: Annotated[Decision, Field(strict=False)]
    proposal: Proposal = None
    purpose: Unicode = ""
    thoughts: Unicode = ""
    response: Unicode = ""
    probability: Probability | None = None
    threshold: Probability | None = None
    propensity: Probability | None = None
    agent_seconds: float | None = None
    gate_seconds: float | None = None
    error: Unicode = ""


class ReplyEntry(_Entry):
    """How the offer after the event `number` ended."""

    kind: Literal["reply"] = "reply"
    number: int
    now: float
    reply: Annotated[Reply, Field(strict=False)]


class PresenceEntry(_Entry):
    """The user went away or came back."""

    kind: Literal["presence"] = "presence"
    away: bool
    at: float
    now: float
    cursor: dict[str, Any]


class GapEntry(_Entry):
    """Nothing is known of the time from `since` to `at`."""

    kind: Literal["gap"] = "gap"
    since: float
    at: float
    now: float
    reason: Unicode
    cursor: dict[str, Any]


class ActionEntry(_Entry):
    """What a tool did after the offer of the event `number` was accepted."""

    kind: Literal["action"] = "action"
    number: int
    now: float
    tool: Unicode
    outcome: Outcome
    what: Unicode


Entry = EventEntry | ReplyEntry | ActionEntry | PresenceEntry | GapEntry
_ENTRIES: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])


class SessionLog(AppendLog):
    """Writes the log of a running session. It keeps no entry in memory.

    Args:
        resume: Called with each entry that the file already contains.
    """

    of: ClassVar[str] = "a live session"
    mode: ClassVar[int] = 0o600

    def __init__(self, resume: Callable[[Entry], None]) -> None:
        super().__init__()
        self._resume = resume

    def take(self, entry: dict[str, Any]) -> None:
        self._resume(_ENTRIES.validate_python(entry))

    def add(self, entry: Entry) -> None:
        """Write an entry; it is on the disk before this returns."""
        self._append(entry.model_dump(mode="json"))


def read_session(folder: Path) -> tuple[dict[str, Any], Iterator[Entry]]:
    """Return the settings of a session, and an iterator that reads its entries.

    Raises:
        UserError: The folder contains no session, or a line is not an entry.
    """
    path = folder / SESSION_FILE
    lines = _lines(path)
    first = next(lines, ("", None))[1]
    if not isinstance(first, dict) or not isinstance(first.get("settings"), dict):
        raise UserError(f"{path} is not the log of a live session", SESSION_HINT)
    return first["settings"], (_entry(content, where) for where, content in lines)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each complete line. The last line is incomplete if the process was killed while it wrote it."""
    with open_file(path, MAX_RECORDS_BYTES, hint=SESSION_HINT) as file:
        last = file.seek(0, 2)
        if last:
            file.seek(-1, 2)
        ends = last == 0 or file.read(1) == b"\n"
        file.seek(0)
        before: tuple[str, str] | None = None
        for where, line in text_lines(file, path):
            if before is not None:
                yield before[0], parse_json(before[1], before[0])
            before = where, line
        if before is not None and ends:
            yield before[0], parse_json(before[1], before[0])


def _entry(content: Any, where: str) -> Entry:
    try:
        return _ENTRIES.validate_python(content)
    except ValueError as error:
        raise UserError(f"{where}: is not an entry of a live session", SESSION_HINT) from error
