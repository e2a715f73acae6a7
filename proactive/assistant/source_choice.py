"""The source that `--source` names, or else the embedded one, with its clock and the recorded offers of a trace."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import Corpus, load_corpus
from datamodules.corpus.traces import Candidate, ProposalKey, Recorded, Trace, read_traces, root_traces
from datamodules.errors import UserError
from datamodules.files.reading import open_file
from proactive.assistant.activitywatch import ActivityWatchSource, ExportSource
from proactive.assistant.clock import Clock, ReplayClock, SystemClock
from proactive.assistant.observations import Source
from proactive.assistant.privacy import PrivacyOptions
from proactive.assistant.trace_source import TraceSource

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from models.judging.weights import Weights

EMBEDDED = "embedded"
FIRST_BYTES = 1024  # of a file; they show whether it is an export or a trace


class ChosenSource(NamedTuple):
    """A source, its clock, and the recorded trace; None instead of the trace if the source is not one."""

    source: Source
    clock: Clock
    recorded: Recorded | None


def read_source(options: "Namespace", privacy: PrivacyOptions) -> ChosenSource:
    """Return the source that `--source` names.

    Raises:
        UserError: The file is not a source.
    """
    replay = ReplayClock(options.speed)
    if "://" in options.source:
        system = SystemClock()
        return ChosenSource(ActivityWatchSource(options.source, system, privacy), system, None)
    path = Path(options.source)
    if _is_export(path):
        return ChosenSource(ExportSource(path, replay, privacy), replay, None)
    return _replayed(_read_trace(path), replay)


def embedded_source(weights: "Sequence[Weights[Any]]", speed: float) -> ChosenSource:
    """Return the trace of the embedded data that the weights are exposed to least.

    Args:
        weights: At least one.
        speed: What `--speed` says.
    """
    return _replayed(_embedded(load_corpus(EMBEDDED), weights), ReplayClock(speed))


def _replayed(recorded: Recorded, clock: Clock) -> ChosenSource:
    return ChosenSource(TraceSource(recorded.traces[0], clock), clock, recorded)


def _is_export(path: Path) -> bool:
    """Return whether a file is a JSON object, as exports of ActivityWatch are, instead of a list, as traces are.

    Raises:
        UserError: There is no such file.
    """
    if path.is_dir():
        return False
    with open_file(path, None, "--source") as file:
        return file.read(FIRST_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")


def _read_trace(path: Path) -> Recorded:
    """Read one trace, in either of the published layouts.

    Raises:
        UserError: It is a folder, or not a trace; the message names file, place and field.
    """
    if path.is_dir():
        raise UserError(f"--source: {path} is a folder", "Give one trace, a JSON file.")
    (recorded,) = read_traces(path).values()
    if not recorded.traces[0].events:
        raise UserError(f"--source: {path} contains no event", "Give another trace.")
    return recorded


def _embedded(corpus: Corpus, weights: "Sequence[Weights[Any]]") -> Recorded:
    """Return the trace that the weights are exposed to least, with offers and judgments of the annotated rows.

    Its answer after an event is the first offer of the rows that end with this event.
    """
    trace = min(root_traces(corpus), key=lambda one: max(own.exposure(one, None) for own in weights))
    rows = _rows_after(corpus.rows, trace)
    offers = [[row for row in after if row.proposal is not None] for after in rows]
    answers = [[Candidate(after[0].proposal, after[0].proposal)] if after else [Candidate(None)] for after in offers]
    judgments = {
        ProposalKey(trace.name, step, row.proposal): row.accepted for step, after in enumerate(offers) for row in after
    }
    return Recorded([trace], {trace.name: answers}, judgments)


def recorded_judgments(recorded: Recorded) -> dict[tuple[int, str], bool]:
    """Return the judgments of the offers of one trace, by the number of the event, from 1, and the offer."""
    return {
        (offer.step + 1, offer.proposal): accepted
        for offer, accepted in recorded.judgments.items()
        if offer.proposal is not None
    }


def _rows_after(rows: Sequence[AnnotatedRow], trace: Trace) -> list[list[AnnotatedRow]]:
    """The rows after each event of a trace."""
    by_history: dict[int, list[AnnotatedRow]] = {}
    for row in rows:
        if row.history == trace.events[: len(row.history)]:
            by_history.setdefault(len(row.history), []).append(row)
    return [by_history.get(step + 1, []) for step in range(len(trace.events))]
