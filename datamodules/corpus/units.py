"""Units of annotation: a history with all offers after it; and the conversion of labels to annotated rows.

There are two rules. `majority_rows` decides each offer by the majority, and silence by the answers about the need for
help. `published_rows` is the rule of the published rows, which infers the need for help from the offers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.corpus.records import AnnotatedRow, Event, running_digests
from datamodules.corpus.traces import read_traces

MIN_VOTES = 2  # published rule: this number of annotators decides an offer


@dataclass(frozen=True)
class Unit:
    """What one question of an annotator contains.

    `offers` maps each offer to the names of its sources. `trace` is the name of the session.
    """

    trace: str
    history: tuple[Event, ...]
    offers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class UnitLabel:
    """One annotator's answers about a unit: whether each offer is accepted, and whether help was needed.

    `help_needed` is None if it was not asked, as in the published annotations.
    """

    accepted: tuple[bool, ...]
    help_needed: bool | None = None


def read_units(path: Path) -> list[Unit]:
    """Read the units of a trace, of a folder of traces, or of a folder with one such folder per agent.

    The offers of several agents after the same history are one unit.

    Raises:
        UserError: There is no trace, or one does not fit; the message names file, place and field.
    """
    units: dict[int, Unit] = {}
    sources: dict[tuple[int, str], dict[str, None]] = {}
    for source, recorded in read_traces(path).items():
        for trace in recorded.traces:
            for step, digest in enumerate(running_digests(trace.events)):
                units.setdefault(digest, Unit(trace.name, trace.history(step), {}))
                for candidate in recorded.answers[trace.name][step]:
                    if candidate.proposal is not None:
                        sources.setdefault((digest, candidate.proposal), {})[source] = None
    offers: dict[int, dict[str, tuple[str, ...]]] = {digest: {} for digest in units}
    for (digest, proposal), names in sources.items():
        offers[digest][proposal] = tuple(names)
    return [Unit(unit.trace, unit.history, offers[digest]) for digest, unit in units.items()]


def units_of_rows(rows: Iterable[AnnotatedRow]) -> list[Unit]:
    """Return the units of annotated rows; their traces are named by scene."""
    by_history: dict[int, list[AnnotatedRow]] = {}
    for row in rows:
        by_history.setdefault(row.history_digest, []).append(row)
    return [
        Unit(rows[0].scene, rows[0].history, {row.proposal: ("rows",) for row in rows if row.proposal is not None})
        for rows in by_history.values()
    ]


def majority(labels: Sequence[bool]) -> bool | None:
    """Return the majority; None for a tie or without answers."""
    return None if sum(labels) * 2 == len(labels) else sum(labels) * 2 > len(labels)


def decide(labels: Sequence[UnitLabel], adjudicated: UnitLabel | None = None) -> list[bool | None]:
    """Return the verdict on each offer of a unit, then on silence: the adjudicator's, else the majority's.

    Silence is accepted if no help was needed. None is a tie.
    """
    if adjudicated is not None:
        return [*adjudicated.accepted, not adjudicated.help_needed]
    return [
        *(majority(votes) for votes in zip(*(label.accepted for label in labels), strict=True)),
        majority([not label.help_needed for label in labels]),
    ]


def majority_rows(unit: Unit, labels: Sequence[UnitLabel], adjudicated: UnitLabel | None = None) -> list[AnnotatedRow]:
    """Return a row for silence and one for each offer; ties give no row, and a tie on silence gives no help_needed.

    Args:
        unit: The unit.
        labels: The labels of its annotators, all with an answer about the need for help.
        adjudicated: The adjudicator's label, if there is one.
    """
    *verdicts, silence = decide(labels, adjudicated)
    needed = None if silence is None else not silence
    rows = [] if silence is None else [_row(unit, None, silence, needed, [not one.help_needed for one in labels])]
    for number, (proposal, verdict) in enumerate(zip(unit.offers, verdicts, strict=True)):
        if verdict is not None:
            rows.append(_row(unit, proposal, verdict, needed, [label.accepted[number] for label in labels]))
    return rows


def published_rows(unit: Unit, labels: Sequence[UnitLabel]) -> list[AnnotatedRow]:
    """Return the rows of the published conversion, which ignores the answers about the need for help.

    Help was needed if all annotators accept the same offer. Silence gets a row only if somebody accepts an offer. Two
    annotators who agree decide an offer. With four annotators, two may accept and two reject it: that gives two rows.
    """
    votes = [[label.accepted[number] for label in labels] for number in range(len(unit.offers))]
    needed = any(all(said) for said in votes)
    silent = [not any(label.accepted) for label in labels]
    rows = []
    if len(labels) >= MIN_VOTES and not all(silent):
        rows.append(_row(unit, None, not needed, needed, silent))
    for verdict in (True, False):
        for proposal, said in zip(unit.offers, votes, strict=True):
            if said.count(verdict) >= MIN_VOTES:
                rows.append(_row(unit, proposal, verdict, needed, said))
    return rows


def _row(unit: Unit, proposal: str | None, accepted: bool, needed: bool | None, said: Sequence[bool]) -> AnnotatedRow:
    return AnnotatedRow.model_validate(
        {
            "obs": unit.history,
            "pred_task": proposal,
            "valid": accepted,
            "help_needed": needed,
            "annotation": tuple(said),
        }
    )
