"""Judged proposals, and preferences: of two proposals after one history, one was accepted and the other rejected.

They come from annotated rows, and from files such as the preferences.jsonl of a simulation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Self

from annotated_types import Gt, Le
from pydantic import BaseModel, ConfigDict, model_validator

from datamodules.corpus.json_records import read_jsonl
from datamodules.corpus.records import (
    AnnotatedRow,
    Event,
    History,
    Judgment,
    Proposal,
    Unicode,
    history_digest,
    scene_of,
)
from datamodules.ranges import FINITE

Weight = Annotated[float, Gt(0), Le(1000), FINITE]


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
    """A line of a preference file: two proposals, or one with its judgment."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    page: ClassVar[str] = "docs/how-to/preferences.md"

    history: History
    chosen: Proposal = None
    rejected: Proposal = None
    proposal: Proposal = None
    accepted: Judgment | None = None
    source: Unicode = ""
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _is_a_pair_or_a_judgment(self) -> Self:
        given = self.model_fields_set & {"chosen", "rejected", "proposal", "accepted"}
        if given == {"chosen", "rejected"}:
            if self.chosen == self.rejected:
                raise ValueError("expected two different proposals in chosen and rejected")
        elif given != {"proposal", "accepted"} or self.accepted is None:
            raise ValueError("expected either chosen and rejected, or proposal and accepted")
        if not self.history:
            raise ValueError("field history: expected at least one event")
        return self

    @property
    def judged(self) -> list[JudgedProposal]:
        """The judged proposals of the line: one, or the chosen and the rejected one."""
        if self.accepted is not None:
            return [JudgedProposal(self.history, self.proposal, self.accepted, self.weight)]
        return [
            JudgedProposal(self.history, self.chosen, True, self.weight),
            JudgedProposal(self.history, self.rejected, False, self.weight),
        ]


def read_preferences(path: Path) -> list[PreferenceRecord]:
    """Read a preference file.

    Raises:
        UserError: It cannot be read, or a line does not fit.
    """
    return read_jsonl(path, PreferenceRecord)


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
