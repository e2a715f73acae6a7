"""Judged proposals, and preferences: of two proposals after one history, one was accepted and the other rejected.

They come from annotated rows, and from tables such as the preferences.jsonl of a simulation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Gt, Le
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from datamodules.corpus.columns import HistoryCell, JudgmentCell
from datamodules.corpus.json_records import shown, validate
from datamodules.corpus.records import AnnotatedRow, Event, Proposal, Unicode, history_digest, scene_of
from datamodules.corpus.tables import Tables, open_training_tables
from datamodules.errors import UserError
from datamodules.ranges import FINITE

PAIR, SINGLE = ("chosen", "rejected"), ("proposal", "accepted")


def _number(value: Any) -> Any:
    """Convert a cell of CSV."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"expected a number, got {shown(value)}") from None


Weight = Annotated[float, Gt(0), Le(1000), FINITE, BeforeValidator(_number)]


@dataclass(frozen=True)
class JudgedProposal:
    """A proposal after a history, its judgment, and its weight in the mean loss; `of_scene` is its row's scene."""

    history: tuple[Event, ...]
    proposal: str | None
    accepted: bool
    weight: float = 1.0
    of_scene: str | None = None

    @property
    def scene(self) -> str:
        """The name of its scene: that of its row, or else of its history."""
        return self.of_scene or scene_of(self.history)

    @cached_property
    def history_digest(self) -> int:
        """See `datamodules.corpus.records.history_digest`."""
        return history_digest(self.history)


@dataclass(frozen=True)
class Preference:
    """An accepted and a rejected proposal after one history, and the weight of the pair in the mean loss."""

    chosen: JudgedProposal
    rejected: JudgedProposal
    weight: float = 1.0


class PreferenceRecord(BaseModel):
    """A record of a table of preferences: two proposals, or one with its judgment."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    page: ClassVar[str] = "docs/how-to/preferences.md"

    history: HistoryCell
    chosen: Proposal = None
    rejected: Proposal = None
    proposal: Proposal = None
    accepted: JudgmentCell | None = None
    source: Unicode = ""
    weight: Weight = 1.0

    @model_validator(mode="before")
    @classmethod
    def _without_empty_cells(cls, data: Any) -> Any:
        """Leave out what a table has because its rows have the same columns: of pairs or of judgments, and optional."""
        if not isinstance(data, dict):
            return data
        empty = {name for name, value in data.items() if value is None}
        left_out = empty & {"source", "weight"}
        if data.keys() >= {*PAIR, *SINGLE}:
            left_out |= next((set(kind) for kind in (SINGLE, PAIR) if empty >= set(kind)), set())
        return {name: value for name, value in data.items() if name not in left_out}

    @model_validator(mode="after")
    def _is_a_pair_or_a_judgment(self) -> Self:
        given = self.model_fields_set & {*PAIR, *SINGLE}
        if given == set(PAIR):
            if self.chosen == self.rejected:
                raise ValueError("expected two different proposals in chosen and rejected")
        elif given != set(SINGLE) or self.accepted is None:
            raise ValueError("expected either chosen and rejected, or proposal and accepted")
        if not self.history:
            raise ValueError("field history: expected at least one event")
        return self

    @property
    def judged(self) -> list[JudgedProposal]:
        """The judged proposals of the record: one, or the chosen and the rejected one."""
        if self.accepted is not None:
            return [JudgedProposal(self.history, self.proposal, self.accepted, self.weight)]
        return [
            JudgedProposal(self.history, self.chosen, True, self.weight),
            JudgedProposal(self.history, self.rejected, False, self.weight),
        ]


FIELDS = tuple(PreferenceRecord.model_fields)


def open_preferences(source: str) -> Tables:
    """Open a source of preferences; see `open_training_tables`.

    Raises:
        UserError: It is no such source, none of its tables trains, or one of them has no histories.
    """
    tables = open_training_tables(source, "data.preferences")
    for table in tables.of("train"):
        if table.names and "history" not in table.names:
            hint = f"Rename the column of the events so far; {PreferenceRecord.page} shows the columns."
            raise UserError(f"data.preferences: {table.without('history')}", hint)
    return tables


def read_preferences(tables: Tables) -> list[PreferenceRecord]:
    """Read the preferences of the tables that train.

    Raises:
        UserError: A table cannot be read, or a record does not fit.
    """
    return [
        validate(record, PreferenceRecord, where)
        for table in tables.of("train")
        for where, record in table.records(FIELDS)
    ]


def judged_rows(rows: Iterable[AnnotatedRow]) -> list[JudgedProposal]:
    """The judged proposals of annotated rows."""
    return [JudgedProposal(row.history, row.proposal, row.accepted, of_scene=row.scene) for row in rows]


def preferences_of(proposals: Iterable[JudgedProposal]) -> list[Preference]:
    """Pair each accepted proposal with each rejected one after the same history.

    Two accepted proposals, such as an offer and silence, make no pair. A proposal that is both accepted and rejected
    makes none with itself. The weight of a pair is the product of the weights of its proposals.
    """
    by_history: dict[int, tuple[list[JudgedProposal], list[JudgedProposal]]] = {}
    for one in proposals:
        accepted, rejected = by_history.setdefault(one.history_digest, ([], []))
        (accepted if one.accepted else rejected).append(one)
    return [
        Preference(chosen, other, chosen.weight * other.weight)
        for accepted, rejected in by_history.values()
        for chosen in accepted
        for other in rejected
        if chosen.proposal != other.proposal
    ]
