"""Units of annotation: a history with every proposal that was made after it, and rows out of people's answers.

Two rules make annotated rows of answers. `majority_rows` is this project's: each proposal is decided by the majority,
and silence by what people said of the need for help. `published_rows` is the one that the published rows came about by,
which infers the need for help from the proposals.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.corpus.records import AnnotatedRow, Event, history_digests_of
from datamodules.corpus.traces import read_traces

ENOUGH = 2  # of the published rule: so many annotators decide a proposal, however many there are


@dataclass(frozen=True)
class Unit:
    """What people are asked about at once.

    `proposals` holds each proposal in text with the names of the sources that made it; `trace` names the session.
    """

    trace: str
    history: tuple[Event, ...]
    proposals: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class UnitAnswer:
    """What somebody said of a unit: whether each proposal is accepted, and whether help was needed.

    `help_needed` is None where nobody asked, as in the published annotations.
    """

    accepted: tuple[bool, ...]
    help_needed: bool | None = None


def read_units(path: Path) -> list[Unit]:
    """The units of a trace, of a folder of traces, or of a folder that has such a folder for each agent.

    What several agents proposed after the same history is one unit.

    Raises:
        UserError: There is no trace, or one does not fit; the message names file, place and field.
    """
    units: dict[int, Unit] = {}
    sources: dict[tuple[int, str], dict[str, None]] = {}
    for source, recorded in read_traces(path).items():
        for trace in recorded.traces:
            for step, digest in enumerate(history_digests_of(trace.events)):
                units.setdefault(digest, Unit(trace.name, trace.history(step), {}))
                for candidate in recorded.answers[trace.name][step]:
                    if candidate.proposal is not None:
                        sources.setdefault((digest, candidate.proposal), {})[source] = None
    proposals: dict[int, dict[str, tuple[str, ...]]] = {digest: {} for digest in units}
    for (digest, proposal), names in sources.items():
        proposals[digest][proposal] = tuple(names)
    return [Unit(unit.trace, unit.history, proposals[digest]) for digest, unit in units.items()]


def units_of_rows(rows: Iterable[AnnotatedRow]) -> list[Unit]:
    """The units that annotated rows are of; their traces are named by scene."""
    by_history: dict[int, list[AnnotatedRow]] = {}
    for row in rows:
        by_history.setdefault(row.history_digest, []).append(row)
    return [
        Unit(rows[0].scene, rows[0].history, {row.proposal: ("rows",) for row in rows if row.proposal is not None})
        for rows in by_history.values()
    ]


def majority(answers: Sequence[bool]) -> bool | None:
    """What most say; None is a tie, or that nobody said anything."""
    return None if sum(answers) * 2 == len(answers) else sum(answers) * 2 > len(answers)


def decide(answers: Sequence[UnitAnswer], adjudicated: UnitAnswer | None = None) -> list[bool | None]:
    """The verdict on each proposal of a unit, and last on silence: the adjudicator's, or else the majority's.

    Silence is accepted where no help was needed. None is a tie.
    """
    if adjudicated is not None:
        return [*adjudicated.accepted, not adjudicated.help_needed]
    return [
        *(majority(votes) for votes in zip(*(answer.accepted for answer in answers), strict=True)),
        majority([not answer.help_needed for answer in answers]),
    ]


def majority_rows(
    unit: Unit, answers: Sequence[UnitAnswer], adjudicated: UnitAnswer | None = None
) -> list[AnnotatedRow]:
    """A row for silence and one for each proposal; what is tied has none, and a tie on silence states no need.

    Args:
        unit: The unit.
        answers: Those of its annotators, who were all asked whether help was needed.
        adjudicated: What settles ties, if somebody did.
    """
    *verdicts, silence = decide(answers, adjudicated)
    needed = None if silence is None else not silence
    rows = [] if silence is None else [_row(unit, None, silence, needed, [not one.help_needed for one in answers])]
    for number, (proposal, verdict) in enumerate(zip(unit.proposals, verdicts, strict=True)):
        if verdict is not None:
            rows.append(_row(unit, proposal, verdict, needed, [answer.accepted[number] for answer in answers]))
    return rows


def published_rows(unit: Unit, answers: Sequence[UnitAnswer]) -> list[AnnotatedRow]:
    """The rows that the published conversion makes of a unit; it reads no answer on the need for help.

    Help was needed where all annotators accept one and the same proposal. Silence gets a row only if somebody accepts
    something. Two annotators who agree decide a proposal; of four, two may accept and two reject it, in a row each.
    """
    votes = [[answer.accepted[number] for answer in answers] for number in range(len(unit.proposals))]
    needed = any(all(said) for said in votes)
    silent = [not any(answer.accepted) for answer in answers]
    rows = []
    if len(answers) >= ENOUGH and not all(silent):
        rows.append(_row(unit, None, not needed, needed, silent))
    for verdict in (True, False):
        for proposal, said in zip(unit.proposals, votes, strict=True):
            if said.count(verdict) >= ENOUGH:
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
