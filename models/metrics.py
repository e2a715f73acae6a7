"""Figures of a judge of proposals, all from torchmetrics, and the rows that others published.

Shape legend: N rows, R bootstrap resamples.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_calibration_error,
    binary_f1_score,
    binary_precision,
    binary_recall,
    binary_stat_scores,
)
from torchmetrics.utilities import dim_zero_cat

from datamodules.records import Category

# Reward models on the 120 rows of reward_data/test_data.jsonl, from the paper (arXiv 2410.12361, its table of
# reward model agreement) and, for the last row, the published model's confusion counts.
PUBLISHED_REWARD_ROWS: dict[str, dict[str, float]] = {
    "GPT-4o": {"f1": 0.6704, "accuracy": 0.5083},
    "GPT-4o-mini": {"f1": 0.6324, "accuracy": 0.5833},
    "Llama-3.1-8B": {"f1": 0.5846, "accuracy": 0.5500},
    "Llama-3.1-70B": {"f1": 0.6748, "accuracy": 0.5583},
    "published 8B reward model": {"f1": 0.9180, "accuracy": 0.9167, "precision": 0.9032, "recall": 0.9333},
}


class RewardMetrics(Metric):
    """How well P(accepted) matches what people said; accepted is the positive class.

    Rows are kept until `compute`, which gathers them from all ranks, so that ranks may hold unequal numbers.

    Args:
        threshold: A probability above it counts as accepted.
        bootstrap: Resamples for 95% percentile intervals of accuracy and F1; none are computed if 0.
    """

    full_state_update = False
    probability: list[Tensor]
    target: list[Tensor]
    category: list[Tensor]
    row: list[Tensor]

    def __init__(self, threshold: float = 0.5, bootstrap: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        self.bootstrap = bootstrap
        for name in ("probability", "target", "category", "row"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, probability: Tensor, target: Tensor, category: Tensor, row: Tensor | None = None) -> None:
        """Add rows.

        Args:
            probability: (N,) floating, P(accepted) in [0, 1].
            target: (N,) int64, 1 for accepted.
            category: (N,) int64, the index of each row's category.
            row: (N,) int64, which row each is, for who wants to look it up in `rows()`.
        """
        self.probability.append(probability.double())
        self.target.append(target)
        self.category.append(category)
        self.row.append(torch.full_like(target, -1) if row is None else row)

    def compute(self) -> dict[str, Tensor]:
        """The figures of `reward_figures`."""
        probability_N, target_N, category_N = map(dim_zero_cat, (self.probability, self.target, self.category))
        return reward_figures(probability_N, target_N, category_N, self.threshold, self.bootstrap)

    def rows(self) -> dict[str, Tensor]:
        """The rows of all ranks, by their number: probability (N,) float64; target, category and row (N,) int64."""
        with self.sync_context():
            rows = {name: dim_zero_cat(getattr(self, name)) for name in ("probability", "target", "category", "row")}
        order = rows["row"].argsort(stable=True)  # so that no figure depends on ranks and layout
        return {name: column[order] for name, column in rows.items()}


def reward_figures(
    probability_N: Tensor, target_N: Tensor, category_N: Tensor, threshold: float = 0.5, bootstrap: int = 0
) -> dict[str, Tensor]:
    """Each figure by name, as a scalar tensor: fractions in [0, 1], and the counts tp, fp, tn, fn and rows.

    A figure whose denominator is zero is 0.

    Args:
        probability_N: (N,) floating, P(accepted).
        target_N: (N,) int64, 1 for accepted.
        category_N: (N,) int64, the index of each row's category.
        threshold: A probability above it counts as accepted.
        bootstrap: Resamples for the intervals; none if 0.
    """
    decided_N = (probability_N > threshold).long()
    tp, fp, tn, fn, _ = binary_stat_scores(decided_N, target_N)
    both_classes = bool(target_N.any()) and not bool(target_N.all())
    figures = {
        "accuracy": binary_accuracy(decided_N, target_N),
        "precision": binary_precision(decided_N, target_N),
        "recall": binary_recall(decided_N, target_N),
        "f1": binary_f1_score(decided_N, target_N),
        "auroc": binary_auroc(probability_N, target_N) if both_classes else torch.tensor(0.0),
        "calibration_error": binary_calibration_error(probability_N, target_N, n_bins=10),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "rows": torch.tensor(len(target_N)),
    }
    for category in Category:
        mine = category_N == category.number
        agreement = binary_accuracy(decided_N[mine], target_N[mine]) if mine.any() else torch.tensor(0.0)
        figures[f"agreement_{category}"] = agreement
    if bootstrap:
        figures |= bootstrap_intervals(decided_N, target_N, bootstrap)
    return {name: value.double() for name, value in figures.items()}


def bootstrap_intervals(decided_N: Tensor, target_N: Tensor, resamples: int, seed: int = 0) -> dict[str, Tensor]:
    """95% percentile intervals of accuracy and F1 over rows drawn with replacement.

    Args:
        decided_N: (N,) int64, 1 where the judge says accepted.
        target_N: (N,) int64, 1 for accepted.
        resamples: How many times N rows are drawn.
        seed: The same seed gives the same intervals.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {"accuracy": [], "f1": []}
    for part_R in torch.arange(resamples).split(100):  # all of them at once take more memory than a small model
        rows_RN = torch.randint(len(target_N), (len(part_R), len(target_N)), generator=generator).to(target_N.device)
        for name, figure in (("accuracy", binary_accuracy), ("f1", binary_f1_score)):
            parts[name].append(figure(decided_N[rows_RN], target_N[rows_RN], multidim_average="samplewise"))
    bounds = torch.tensor([0.025, 0.975], device=target_N.device)
    intervals: dict[str, Tensor] = {}
    for name, values in parts.items():
        low, high = torch.quantile(torch.cat(values).float(), bounds)
        intervals |= {f"{name}_low": low, f"{name}_high": high}
    return intervals
