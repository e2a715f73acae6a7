"""The lines that a live session prints for each entry of its log."""

from datetime import datetime

from proactive.assistant.deciding import Decision
from proactive.assistant.session_log import ActionEntry, Entry, EventEntry, GapEntry, PresenceEntry


def lines_of(entry: Entry) -> list[str]:
    """Return the lines that tell a person what happened and what was decided."""
    if isinstance(entry, EventEntry):
        return _event_lines(entry)
    if isinstance(entry, PresenceEntry):
        return [f"{_clock(entry.at)}  (the user {'went away' if entry.away else 'came back'})"]
    if isinstance(entry, GapEntry):
        return [f"{_clock(entry.at)}  (nothing is known since {_clock(entry.since)}: {entry.reason})"]
    if isinstance(entry, ActionEntry):
        return [f"          {entry.tool}: {entry.outcome}: {entry.what}"]
    return [f"          {entry.reply.value}"]


def _event_lines(entry: EventEntry) -> list[str]:
    line = f"{_clock(entry.at)}  {entry.event.event}"
    if entry.proposal is None:
        return [f"{line}  [{entry.decision.value}{_reason(entry)}]"]
    gate = ""
    if entry.probability is not None and entry.threshold is not None:
        gate = f"P(accepted) {entry.probability:.2f}, threshold {entry.threshold:.2f}: "
        if entry.decision == Decision.SHOWN and entry.probability < entry.threshold:
            gate = f"{gate.removesuffix(': ')}, below it: "
    return [line, f"          offer: {entry.proposal}", f"          {gate}{entry.decision.value}{_reason(entry)}"]


def _reason(entry: EventEntry) -> str:
    return f": {entry.error}" if entry.error else ""


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at):%H:%M:%S}"
