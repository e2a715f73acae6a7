"""Exports live sessions as training data: traces, annotated rows, conversations and preferences."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.corpus.sources import TRAIN_FILE
from datamodules.errors import UserError
from datamodules.files.writing import write_atomically
from models.reporting.timeline import TIMELINE_FILE, ShownOffer, ShownStep, ShownTrace, ShownTraces, outcome
from proactive.assistant.deciding import Decision, Reply
from proactive.assistant.session_log import Entry, EventEntry, GapEntry, PresenceEntry, ReplyEntry, read_session
from proactive.assistant.session_state import Absences
from proactive.simulation.simulated_traces import TRACES, Attempt, Step, write_trace
from proactive.simulation.training_data import PREFERENCES_FILE, PROVENANCE_FILE, training_data, write_training_data

ANNOTATOR = "user"
JUDGED = {Reply.ACCEPTED: True, Reply.REJECTED: False}


@dataclass
class LiveTrace:
    """The part of a session between two long absences of the user.

    Attributes:
        session: The name of the session's folder.
        events: Its events, with what came of them.
        replies: How offers ended, by the number of their event.
    """

    session: str
    events: list[EventEntry] = field(default_factory=list)
    replies: dict[int, Reply] = field(default_factory=dict)

    def verdict(self, entry: EventEntry) -> bool | None:
        """Return whether the user accepted the offer after an event; None if they did not say."""
        reply = self.replies.get(entry.number)
        return None if reply is None else JUDGED.get(reply)

    def step(self, entry: EventEntry) -> Step:
        """Return an event with the offer that was shown after it."""
        if entry.decision != Decision.SHOWN:
            return Step(entry.event, "user", "")
        reply = self.replies.get(entry.number, Reply.WITHDRAWN)
        judgment = reply.value if reply in JUDGED else "ignored"
        notes = entry.model_dump(include={"purpose", "thoughts", "proposal", "response"})
        attempt = Attempt.model_validate({**notes, "judgment": judgment, "reason": reply.value})
        return Step(entry.event, "user", "", (attempt,))


def export_sessions(sessions: Sequence[Path], output: Path) -> dict[str, int]:
    """Write sessions as a data root that `fit` takes, with a file for the trace reader.

    Offers that were ignored or withdrawn have no row, no preference and no verdict.

    Args:
        sessions: Folders of sessions.
        output: The folder to make.

    Returns:
        The number of traces, events, rows and preferences.

    Raises:
        UserError: Something is in the way, a folder holds no session, or no offer was accepted or rejected.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists", "Give a new folder.")
    traces = {
        f"session_{number:03}_trace_{part}": trace
        for number, folder in enumerate(sessions, 1)
        for part, trace in enumerate(traces_of(read_session(folder)[1], folder.resolve().name), 1)
    }
    steps = {name: [trace.step(entry) for entry in trace.events] for name, trace in traces.items()}
    files = training_data(steps, ANNOTATOR)
    if not files[TRAIN_FILE]:
        raise UserError("no offer of these sessions was accepted or rejected", "Give more sessions.")
    files[PROVENANCE_FILE] = [_provenance(one, traces[one["trace"]]) for one in files[PROVENANCE_FILE]]
    files[PREFERENCES_FILE] = [pair for trace in traces.values() for pair in _preferences(trace)]
    for name, found in steps.items():
        write_trace(output / TRACES / f"{name}.json", found)
    shown = ShownTraces(notes=(), traces=tuple(_shown(name, trace) for name, trace in traces.items()))
    write_atomically(output / TIMELINE_FILE, shown.model_dump_json(indent=1) + "\n")
    write_training_data(output, files)
    counts = Counter(traces=len(traces), events=sum(map(len, steps.values())))
    return counts | {"rows": len(files[TRAIN_FILE]), "preferences": len(files[PREFERENCES_FILE])}


def traces_of(entries: Iterable[Entry], session: str) -> list[LiveTrace]:
    """Return the traces of a session: a long absence ends one. Traces without events are left out."""
    traces, absences = [LiveTrace(session)], Absences()
    for entry in entries:
        if isinstance(entry, EventEntry):
            traces[-1].events.append(entry)
        elif isinstance(entry, ReplyEntry):
            traces[-1].replies[entry.number] = entry.reply
        elif isinstance(entry, PresenceEntry | GapEntry) and absences.ends_trace(entry):
            traces.append(LiveTrace(session))
    return [trace for trace in traces if trace.events]


def _provenance(record: dict[str, Any], trace: LiveTrace) -> dict[str, Any]:
    entry = trace.events[record["step"]]
    gate = entry.model_dump(include={"probability", "threshold", "propensity"})
    return {**record, "session": trace.session, "event": entry.number, **gate}


def _preferences(trace: LiveTrace) -> list[dict[str, Any]]:
    """An accepted offer is preferred to silence, and silence to a rejected one."""
    pairs = []
    history: list[dict[str, Any]] = []
    for entry in trace.events:
        history = [*history, entry.event.model_dump()]
        verdict = trace.verdict(entry)
        if entry.decision == Decision.SHOWN and verdict is not None:
            chosen, rejected = (entry.proposal, None) if verdict else (None, entry.proposal)
            pairs.append({"history": history, "chosen": chosen, "rejected": rejected, "source": "live", "weight": 1.0})
    return pairs


def _shown(name: str, trace: LiveTrace) -> ShownTrace:
    """The trace for the reader, with what the gate held back."""
    steps = []
    for entry in trace.events:
        shown, verdict = entry.decision == Decision.SHOWN, trace.verdict(entry)
        notes = {"Decision": entry.decision.value}
        if entry.number in trace.replies:
            notes["Reply"] = trace.replies[entry.number].value
        offer = ShownOffer(
            entry.proposal,
            verdict=verdict,
            gate=entry.probability,
            held_back=entry.proposal is not None and not shown,
            notes=notes,
        )
        steps.append(ShownStep((offer,), outcome(shown, verdict)))
    return ShownTrace(name, tuple(entry.event for entry in trace.events), tuple(steps))
