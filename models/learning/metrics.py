"""Metrics of judges and agents, on torchmetrics. `published_metrics` has those of ProactiveBench.

Shape legend: N rows (for an agent: events), R bootstrap resamples, K candidates, T traces, G groups of rows (scenes or
traces).
"""

from typing import Any, ClassVar

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

from datamodules.batching.steps import AgentBatch, RewardBatch
from datamodules.corpus.records import Category
from models.networks.devices import as_float64

BOOTSTRAP_RESAMPLES = 1000
FILLER = -1  # the index of a row that only fills up a rank's share
FEW_GROUPS = 10  # scenes or traces: intervals over fewer groups are unreliable


class GatheredRows(Metric):
    """Stores rows, and gathers those of all ranks when they are read. Ranks may have different numbers of rows.

    `columns` names the stored tensors (N,). One of them is `row`, the index of the row, or `FILLER`.
    """

    full_state_update = False
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.columns:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def add(self, *columns: Tensor) -> None:
        """Add rows: tensors (N,) in the order of `columns`."""
        for name, column in zip(self.columns, columns, strict=True):
            getattr(self, name).append(column)

    def rows(self) -> dict[str, Tensor]:
        """The columns of the rows of all ranks, sorted by `row`, without fillers.

        They are on the CPU, because metrics are many small operations, and many wait for their results.
        """
        with self.sync_context():
            return self.stored_rows()

    def stored_rows(self) -> dict[str, Tensor]:
        """The same of this rank only, or within a synchronization of all ranks, as in `compute`."""
        rows = {name: dim_zero_cat(getattr(self, name)).cpu() for name in self.columns}
        order = rows["row"].argsort(stable=True)  # so that no metric depends on ranks and layout
        order = order[rows["row"][order] != FILLER]
        return {name: column[order] for name, column in rows.items()}


def counted_rows(batch: RewardBatch | AgentBatch) -> Tensor:
    """The index of each row of a micro-batch, (R,) int64; `FILLER` if its weight is 0."""
    # A mask of real rows would be read by the CPU, which would have to wait for the device.
    return torch.where(batch["weight"] > 0, batch["row"], FILLER)


class RewardMetrics(GatheredRows):
    """How well P(accepted) matches the judgments of people. Accepted is the positive class.

    Args:
        threshold: A probability above it counts as accepted.
    """

    columns = ("probability", "target", "category", "row")
    probability: list[Tensor]
    target: list[Tensor]
    category: list[Tensor]

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold

    def update(self, probability: Tensor, target: Tensor, category: Tensor, row: Tensor | None = None) -> None:
        """Add rows.

        Args:
            probability: (N,) floating, P(accepted) in [0, 1].
            target: (N,) int64, 1 for accepted.
            category: (N,) int64, the index of each row's category.
            row: (N,) int64, the index of each row, which `rows()` returns, or `FILLER`. By default all are 0.
        """
        self.add(as_float64(probability), target, category, torch.zeros_like(target) if row is None else row)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of `reward_metrics`."""
        rows = self.stored_rows()
        return reward_metrics(rows["probability"], rows["target"], rows["category"], self.threshold)


def reward_metrics(
    probability_N: Tensor,
    target_N: Tensor,
    category_N: Tensor,
    threshold: float = 0.5,
    scene_N: Tensor | None = None,
) -> dict[str, Tensor]:
    """The metrics of a reward classifier by name, as scalar tensors: fractions in [0, 1], and counts.

    The counts are tp, fp, tn, fn, rows and, for each category, rows_CATEGORY. A metric with a zero denominator is 0.
    `acceptance_rate` is the share of rows that the classifier accepts, `people_acceptance_rate` the share that people
    accepted. `agreement_CATEGORY` is the accuracy within a category.

    Args:
        probability_N: (N,) floating, P(accepted).
        target_N: (N,) int64, 1 for accepted.
        category_N: (N,) int64, the index of each row's category.
        threshold: A probability above it counts as accepted.
        scene_N: (N,) int64, the scene of each row, for intervals of accuracy and F1: see `decision_intervals`.
    """
    decided_N = (probability_N > threshold).long()
    tp, fp, tn, fn, _ = binary_stat_scores(decided_N, target_N)
    both_classes = bool(target_N.any()) and not bool(target_N.all())
    metrics = {
        "accuracy": binary_accuracy(decided_N, target_N),
        "precision": binary_precision(decided_N, target_N),
        "recall": binary_recall(decided_N, target_N),
        "f1": binary_f1_score(decided_N, target_N),
        "auroc": binary_auroc(probability_N, target_N) if both_classes else torch.tensor(0.0),
        "calibration_error": binary_calibration_error(probability_N, target_N, n_bins=10),
        "acceptance_rate": decided_N.double().mean(),
        "people_acceptance_rate": target_N.double().mean(),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "rows": torch.tensor(len(target_N)),
    }
    for category in Category:
        mine = category_N == category.number
        agreement = binary_accuracy(decided_N[mine], target_N[mine]) if mine.any() else torch.tensor(0.0)
        metrics[f"agreement_{category}"] = agreement
        metrics[f"rows_{category}"] = mine.sum()
    if scene_N is not None:
        metrics |= decision_intervals(decided_N, target_N, scene_N)
    return {name: value.double() for name, value in metrics.items()}


def decision_intervals(decided_N: Tensor, target_N: Tensor, scene_N: Tensor) -> dict[str, Tensor]:
    """The number of scenes, and 95% intervals of accuracy and F1 over scenes drawn with replacement.

    Rows of one scene are alike, so intervals over single rows would be far too narrow.

    Args:
        decided_N: (N,) int64, 1 where the decision is positive.
        target_N: (N,) int64, 1 where the target is positive.
        scene_N: (N,) int64, the scene of each row.
    """
    counts_G4 = _grouped_counts(decided_N, target_N == decided_N, scene_N)
    intervals = group_intervals(counts_G4, BOOTSTRAP_RESAMPLES)
    kept = {name: value for name, value in intervals.items() if name.startswith(("accuracy_", "f1_"))}
    return {"scenes": torch.tensor(len(counts_G4)), **kept}


def _grouped_counts(decided_N: Tensor, right_N: Tensor, group_N: Tensor) -> Tensor:
    """The confusion counts of each group, (G, 4) int64: true and false positives, true and false negatives.

    Args:
        decided_N: (N,) int64, 1 where the decision is positive.
        right_N: (N,), 1 where the decision is right, 0 where it is wrong. Rows with another value are not counted.
        group_N: (N,) int64, the group of each row.
    """
    kinds = [(1, 1), (1, 0), (0, 1), (0, 0)]
    kind_N4 = torch.stack([(decided_N == offer) & (right_N == right) for offer, right in kinds], dim=1)
    names_G, group_N = group_N.unique(return_inverse=True)
    return kind_N4.new_zeros((len(names_G), 4), dtype=torch.int64).index_add(0, group_N, kind_N4.long())


NO_VERDICT = -1


class AgentMetrics(Metric):
    """Metrics of an agent's decisions with a judge, per event.

    An accepted offer is a true positive, a rejected offer a false positive. An accepted silence is a true negative, a
    rejected silence a false negative. If an event has several candidates, `deciding_candidate` chooses one.

    Args:
        bootstrap: Resamples of whole traces for 95% percentile intervals. If 0, no intervals are computed.
    """

    full_state_update = False
    proposed: list[Tensor]
    accepted: list[Tensor]
    trace: list[Tensor]

    def __init__(self, bootstrap: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bootstrap = bootstrap
        for name in ("proposed", "accepted", "trace"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, proposed: Tensor, accepted: Tensor, trace: Tensor | None = None) -> None:
        """Add events.

        Args:
            proposed: (N,) or (N, K), nonzero where a candidate is text, 0 where it is null.
            accepted: (N,) or (N, K), 1 where the judge accepts a candidate, 0 where it rejects it, `NO_VERDICT`
                where there is no verdict.
            trace: (N,) int64, the trace of each event. If None, each event is its own trace.
        """
        proposed_NK = proposed.long().reshape(len(proposed), -1)
        accepted_NK = accepted.long().reshape(len(accepted), -1)
        if trace is None:
            first = -1 - sum(len(column) for column in self.trace)
            trace = first - torch.arange(len(proposed_NK), device=proposed.device)
        self.proposed.append(proposed_NK)
        self.accepted.append(accepted_NK)
        self.trace.append(trace)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of `agent_metrics` over all K candidates. If K > 1, also over the first k, as `f1@k`."""
        proposed_NK, accepted_NK, trace_N = map(dim_zero_cat, (self.proposed, self.accepted, self.trace))
        if proposed_NK.shape[1] == 1:
            return agent_metrics(proposed_NK, accepted_NK, trace_N, self.bootstrap)
        metrics: dict[str, Tensor] = {}
        for k in range(1, proposed_NK.shape[1] + 1):
            at_k = agent_metrics(proposed_NK[:, :k], accepted_NK[:, :k], trace_N, self.bootstrap)
            metrics |= {f"{name}@{k}": value for name, value in at_k.items()} | at_k
        return metrics


def deciding_candidate(accepted_NK: Tensor) -> Tensor:
    """The index of the candidate that counts, (N,) int64: the first accepted one, else the first with a verdict.

    So an event is accepted if any of its candidates is accepted.
    """
    rank_NK = 2 * (accepted_NK == 1).long() + (accepted_NK == 0).long()
    return rank_NK.argmax(dim=1)  # argmax returns the first maximum


def agent_metrics(proposed_NK: Tensor, accepted_NK: Tensor, trace_N: Tensor, bootstrap: int = 0) -> dict[str, Tensor]:
    """The metrics of an agent by name, as scalar tensors: fractions in [0, 1], and counts.

    Events without a verdict count in `events` and `undecided`, but in no other metric.

    Args:
        proposed_NK: (N, K) int64, 1 where a candidate is text.
        accepted_NK: (N, K) int64, 1 accepted, 0 rejected, `NO_VERDICT` without a verdict.
        trace_N: (N,) int64, the trace of each event.
        bootstrap: Resamples of the traces for intervals; no intervals if 0.
    """
    chosen_N1 = deciding_candidate(accepted_NK)[:, None]
    proposed_N, accepted_N = proposed_NK.gather(1, chosen_N1)[:, 0], accepted_NK.gather(1, chosen_N1)[:, 0]
    counts_T4 = _grouped_counts(proposed_N, accepted_N, trace_N)
    metrics = {
        **confusion_metrics(counts_T4.sum(0)),
        **dict(zip(("tp", "fp", "tn", "fn"), counts_T4.sum(0), strict=True)),
        "events": torch.tensor(len(proposed_N)),
        "undecided": (accepted_N == NO_VERDICT).sum(),
        "traces": torch.tensor(len(counts_T4)),
    }
    if bootstrap:
        metrics |= group_intervals(counts_T4, bootstrap)
    return {name: value.double() for name, value in metrics.items()}


def confusion_metrics(counts: Tensor) -> dict[str, Tensor]:
    """Metrics of confusion counts (..., 4): true positives, false positives, true negatives, false negatives.

    A metric with a zero denominator is 0. `accept_rate`, a name of the published tables, is the precision.
    """
    tp, fp, tn, fn = counts.double().unbind(-1)

    def ratio(part: Tensor, whole: Tensor) -> Tensor:
        return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)

    return {
        "recall": ratio(tp, tp + fn),
        "precision": ratio(tp, tp + fp),
        "accuracy": ratio(tp + tn, tp + fp + tn + fn),
        "false_alarm": ratio(fp, tp + fp),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "accept_rate": ratio(tp, tp + fp),
    }


def group_intervals(counts_G4: Tensor, resamples: int, seed: int = 0) -> dict[str, Tensor]:
    """95% percentile intervals over groups drawn with replacement, because rows of one scene or trace are alike.

    Args:
        counts_G4: (G, 4) int64, the confusion counts of each group, see `confusion_metrics`.
        resamples: How often G groups are drawn.
        seed: The same seed gives the same intervals.

    Returns:
        NAME_low and NAME_high for each metric of `confusion_metrics`. Nothing for a single group, which has no spread.
    """
    if len(counts_G4) < 2:
        return {}
    drawn_RG = group_draws(len(counts_G4), resamples, seed).to(counts_G4.device)
    intervals: dict[str, Tensor] = {}
    for name, values_R in confusion_metrics(drawn_RG @ counts_G4.double()).items():
        low, high = percentile_interval(values_R)
        intervals |= {f"{name}_low": low, f"{name}_high": high}
    return intervals


def group_draws(groups: int, resamples: int, seed: int = 0) -> Tensor:
    """How often each resample has drawn each group, (R, G) float64: G draws with replacement.

    Args:
        groups: The number of groups, at least 1.
        resamples: The number of resamples.
        seed: The same seed gives the same draws.
    """
    generator = torch.Generator().manual_seed(seed)
    groups_RG = torch.randint(groups, (resamples, groups), generator=generator)
    return torch.zeros(resamples, groups, dtype=torch.float64).scatter_add_(
        1, groups_RG, torch.ones((), dtype=torch.float64).expand(resamples, groups)
    )


def percentile_interval(values_R: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of the 95% interval of resampled values (R,) float64: their 2.5th and 97.5th percentiles."""
    low, high = torch.quantile(values_R, torch.tensor([0.025, 0.975], dtype=torch.float64, device=values_R.device))
    return low, high
