"""The agreement of annotators in a project or in annotated rows: of all, by category, and by pair of annotators."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.corpus.agreement import agreement
from datamodules.corpus.records import AnnotatedRow, Category
from datamodules.corpus.units import decide
from proactive.annotation.store import Store, StoredLabel


@dataclass(frozen=True)
class Votes:
    """The votes of annotators on one offer, or on silence.

    Attributes:
        trace: The name of the trace.
        silence: Whether they voted on silence.
        verdict: Whether the majority accepts; None for a tie.
        accepted: By annotator: whether they accept.
    """

    trace: str
    silence: bool
    verdict: bool | None
    accepted: Mapping[str, bool]

    @property
    def category(self) -> Category | None:
        names = {
            (True, True): Category.NON_RESPONSE,
            (True, False): Category.MISSED_NEED,
            (False, True): Category.CORRECT_DETECTION,
            (False, False): Category.FALSE_ALARM,
        }
        return None if self.verdict is None else names[self.silence, self.verdict]


def votes_of_rows(rows: Iterable[AnnotatedRow]) -> list[Votes]:
    """Return the votes of annotated rows, whose annotators have no names."""
    return [
        Votes(row.scene, row.proposal is None, row.accepted, {str(n): said for n, said in enumerate(row.annotation)})
        for row in rows
    ]


def votes_of_project(store: Store) -> list[Votes]:
    """Return the votes on each offer and on silence. An annotator who says that help was needed rejects silence."""
    by_item: dict[int, list[StoredLabel]] = {}
    for label in store.labels():
        if label.annotator is not None:
            by_item.setdefault(label.item, []).append(label)
    found = []
    for labels in by_item.values():
        verdicts = decide([label.label for label in labels])
        for index, verdict in enumerate(verdicts):
            silence = index == len(verdicts) - 1
            votes = {
                str(label.annotator): not label.label.help_needed if silence else label.label.accepted[index]
                for label in labels
            }
            found.append(Votes(labels[0].trace, silence, verdict, votes))
    return found


def agreement_figures(votes: Sequence[Votes], names: bool = True) -> dict[str, dict[str, Any]]:
    """Compute agreement over all votes, on offers and on silence, by category and by pair of annotators.

    A category has only raw agreement. Votes determine the category, so agreement by chance is not defined within it.

    Args:
        votes: The votes.
        names: Whether annotators have names; without names there are no pairs.

    Returns:
        The result of `datamodules.corpus.agreement.agreement` for each group.
    """
    groups: dict[str, list[Votes]] = {
        "all": list(votes),
        "offers": [vote for vote in votes if not vote.silence],
        "silence": [vote for vote in votes if vote.silence],
    }
    figures = {name: _agreement(group) for name, group in groups.items()}
    for category in Category:
        found = _agreement([vote for vote in votes if vote.category is category])
        figures[category.replace("_", " ")] = {k: v for k, v in found.items() if not k.startswith(("alpha", "kappa"))}
    people = sorted({name for vote in votes for name in vote.accepted}) if names else []
    for pair in itertools.combinations(people, 2):
        shared = ((v.trace, [v.accepted[name] for name in pair if name in v.accepted]) for v in votes)
        figures[" and ".join(pair)] = agreement(shared)
    return figures


def _agreement(votes: Iterable[Votes]) -> dict[str, Any]:
    return agreement((vote.trace, list(vote.accepted.values())) for vote in votes)
