"""Traces to replay: with an agent's recorded answers and people's judgments of them, where there are any."""

from collections.abc import Sequence
from pathlib import Path

from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import Corpus
from datamodules.corpus.traces import Candidate, Offer, Recorded, Trace, read_traces
from datamodules.errors import UserError


def read_replay(path: Path) -> Recorded:
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


def embedded_replay(corpus: Corpus, trace: Trace) -> Recorded:
    """Return a trace of the embedded data with what its annotated rows say: offers, and the judgments of them.

    After each event the agent answers with the first offer of the rows after it.
    """
    rows = _rows_after(corpus.rows, trace)
    offers = [[row for row in after if row.proposal is not None] for after in rows]
    answers = [[Candidate(after[0].proposal, after[0].proposal)] if after else [Candidate(None)] for after in offers]
    judgments = {
        Offer(trace.name, step, row.proposal): row.accepted for step, after in enumerate(offers) for row in after
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
