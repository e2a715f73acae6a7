"""Metrics over the test rows of several models, such as those of all folds, and their differences, with intervals.

All intervals draw whole groups of rows with replacement, scenes or traces, as those of a single test do.

Shape legend: N rows, G groups, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.learning.metrics import BOOTSTRAP_RESAMPLES, confusion_metrics, group_draws, percentile_interval

TP, FP, TN, FN, UNDECIDED = 0, 1, 2, 3, -1  # outcomes


@dataclass(frozen=True)
class DecidedRows:
    """What models decided on rows. Each row was decided once.

    Attributes:
        names: The name of each row. Rows of two tests are the same if their names are equal.
        groups: The scene or trace of each row.
        outcome: (N,) int64: TP, FP, TN, FN, or UNDECIDED for a row that counts nowhere.
        score: (N,) float64, the probability of the positive class; None if there is none.
        positive: (N,) bool, the rows of the positive class, for AUROC.
        model: (N,) int64, the number of the model that decided a row, such as its fold.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    outcome: Tensor
    score: Tensor | None
    positive: Tensor
    model: Tensor

    def only(self, names: frozenset[str]) -> "DecidedRows":
        """The rows with these names."""
        kept = [index for index, name in enumerate(self.names) if name in names]
        return DecidedRows(
            tuple(self.names[index] for index in kept),
            tuple(self.groups[index] for index in kept),
            self.outcome[kept],
            None if self.score is None else self.score[kept],
            self.positive[kept],
            self.model[kept],
        )


def outcomes(decided_N: Tensor, positive_N: Tensor) -> Tensor:
    """The outcome of each decision, (N,) int64, from decisions and targets (N,) bool for the positive class."""
    of_positive = torch.where(decided_N, TP, FN)
    return torch.where(positive_N, of_positive, torch.where(decided_N, FP, TN))


def joined(parts: Sequence[DecidedRows]) -> DecidedRows:
    """The rows of several models, numbered in this order. No name may occur twice."""
    scores = [part.score for part in parts]
    return DecidedRows(
        tuple(name for part in parts for name in part.names),
        tuple(group for part in parts for group in part.groups),
        torch.cat([part.outcome for part in parts]),
        None if any(score is None for score in scores) else torch.cat([s for s in scores if s is not None]),
        torch.cat([part.positive for part in parts]),
        torch.cat([torch.full_like(part.outcome, number) for number, part in enumerate(parts)]),
    )


@dataclass(frozen=True)
class Estimate:
    """A metric, or a difference of metrics, with its 95% interval; `low` and `high` are None for a single group."""

    value: float
    low: float | None
    high: float | None


class Tally:
    """The counts of each group, from which metrics of any draw of groups follow.

    Args:
        rows: The rows.
        groups: All groups, in the order of G.
    """

    def __init__(self, rows: DecidedRows, groups: Sequence[str]) -> None:
        numbers = {name: number for number, name in enumerate(groups)}
        group_N = torch.tensor([numbers[group] for group in rows.groups], dtype=torch.int64)
        counted_N = rows.outcome != UNDECIDED
        self.counts_G4 = torch.zeros(len(groups), 4, dtype=torch.float64)
        self.counts_G4.index_put_(
            (group_N[counted_N], rows.outcome[counted_N]), torch.ones((), dtype=torch.float64), accumulate=True
        )
        self.won_GG, self.pairs_GG = _won_pairs(rows, group_N, len(groups))

    def metrics(self, drawn_RG: Tensor) -> dict[str, Tensor]:
        """The metrics of `confusion_metrics`, and `auroc` if there are scores, (R,) each.

        AUROC is the share of pairs of a positive and a negative row in which the positive one has the higher score.
        Only rows that the same model has scored make a pair, because scores of two models have different scales.

        Args:
            drawn_RG: (R, G) float64, how often each group is drawn.
        """
        found = confusion_metrics(drawn_RG @ self.counts_G4)
        if self.won_GG is not None:
            won_R = torch.einsum("rg,gh,rh->r", drawn_RG, self.won_GG, drawn_RG)
            pairs_R = torch.einsum("rg,gh,rh->r", drawn_RG, self.pairs_GG, drawn_RG)
            found["auroc"] = torch.where(pairs_R > 0, won_R / pairs_R.clamp(min=1), 0.0)
        return found


def _won_pairs(rows: DecidedRows, group_N: Tensor, groups: int) -> tuple[Tensor | None, Tensor]:
    """For each two groups, how many pairs of a positive row of the first and a negative row of the second there are.

    Returns:
        The number of pairs whose positive row has the higher score, where equal scores count half, and the number of
        all pairs, (G, G) float64; None instead of the first without scores.
    """
    won_GG, pairs_GG = (torch.zeros(groups, groups, dtype=torch.float64) for _ in range(2))
    if rows.score is None:
        return None, pairs_GG
    for model in rows.model.unique().tolist():
        mine_N = rows.model == model
        positive_N = rows.positive & mine_N
        score_P, group_P = rows.score[positive_N].contiguous(), group_N[positive_N]
        for group in group_N[mine_N].unique().tolist():
            negative = rows.score[mine_N & ~rows.positive & (group_N == group)].sort().values
            below_P = torch.searchsorted(negative, score_P)
            up_to_P = torch.searchsorted(negative, score_P, right=True)
            won_GG[:, group].index_add_(0, group_P, (below_P + up_to_P).double() / 2)
            pairs_GG[:, group].index_add_(0, group_P, torch.full_like(score_P, len(negative)))
    return won_GG, pairs_GG


def pooled_metrics(seeds: Sequence[DecidedRows]) -> dict[str, Estimate]:
    """The mean metrics of one or several seeds that decided the same rows, with intervals over groups.

    Args:
        seeds: For each seed, the rows of all its models.
    """
    return _estimates(*_resampled([seeds]))


def metric_differences(seeds: Sequence[DecidedRows], others: Sequence[DecidedRows]) -> dict[str, Estimate]:
    """The metrics of `seeds` minus those of `others`, with paired intervals: each draw of groups is used for both.

    Args:
        seeds: As in `pooled_metrics`.
        others: The same rows, decided by other models.
    """
    ours, theirs = _resampled([seeds, others])
    return _estimates({name: ours[name] - theirs[name] for name in ours if name in theirs})


def _resampled(settings: Sequence[Sequence[DecidedRows]]) -> list[dict[str, Tensor]]:
    """The mean metrics over the seeds of each setting, (1 + R,): of all groups, then of each draw of groups."""
    groups = sorted({group for seeds in settings for rows in seeds for group in rows.groups})
    drawn_RG = torch.ones(1, len(groups), dtype=torch.float64)
    if len(groups) > 1:
        drawn_RG = torch.cat([drawn_RG, group_draws(len(groups), BOOTSTRAP_RESAMPLES)])
    found = []
    for seeds in settings:
        of_seeds = [Tally(rows, groups).metrics(drawn_RG) for rows in seeds]
        names = [name for name in of_seeds[0] if all(name in one for one in of_seeds)]
        found.append({name: torch.stack([one[name] for one in of_seeds]).mean(0) for name in names})
    return found


def _estimates(values: dict[str, Tensor]) -> dict[str, Estimate]:
    found = {}
    for name, values_R in values.items():
        low, high = map(float, percentile_interval(values_R[1:])) if len(values_R) > 1 else (None, None)
        found[name] = Estimate(float(values_R[0]), low, high)
    return found
