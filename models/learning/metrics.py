"""Figures of a judge of proposals and of an agent, on torchmetrics, and the rows that others published.

Shape legend: N rows (of an agent: events), R bootstrap resamples, K candidates, T traces, G groups of rows: scenes
or traces.
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

from datamodules.corpus.records import Category

# Reward models on the 120 rows of reward_data/test_data.jsonl, from the paper (arXiv 2410.12361, its table of
# reward model agreement) and, for the last row, the published model's confusion counts.
PUBLISHED_REWARD_ROWS: dict[str, dict[str, float]] = {
    "GPT-4o": {"f1": 0.6704, "accuracy": 0.5083},
    "GPT-4o-mini": {"f1": 0.6324, "accuracy": 0.5833},
    "Llama-3.1-8B": {"f1": 0.5846, "accuracy": 0.5500},
    "Llama-3.1-70B": {"f1": 0.6748, "accuracy": 0.5583},
    "published 8B reward model": {"f1": 0.9180, "accuracy": 0.9167, "precision": 0.9032, "recall": 0.9333},
}


BOOTSTRAP_RESAMPLES = 1000
FEW_GROUPS = 10  # scenes or traces: with fewer, intervals over them are not to be relied on


class KeptRows(Metric):
    """Keeps rows until all ranks' are asked for, so that ranks may hold unequal numbers.

    `columns` names what is kept of each row, (N,) tensors; one of them is `row`, the row's number.
    """

    full_state_update = False
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self.columns:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def keep(self, *columns: Tensor) -> None:
        """Add rows: their columns, in the order of `columns`."""
        for name, column in zip(self.columns, columns, strict=True):
            getattr(self, name).append(column)

    def rows(self) -> dict[str, Tensor]:
        """The rows of all ranks, by their number."""
        with self.sync_context():
            rows = {name: dim_zero_cat(getattr(self, name)) for name in self.columns}
        order = rows["row"].argsort(stable=True)  # so that no figure depends on ranks and layout
        return {name: column[order] for name, column in rows.items()}


class RewardMetrics(KeptRows):
    """How well P(accepted) matches what people said; accepted is the positive class.

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
            row: (N,) int64, which row each is, for who wants to look it up in `rows()`.
        """
        self.keep(probability.double(), target, category, torch.full_like(target, -1) if row is None else row)

    def compute(self) -> dict[str, Tensor]:
        """The figures of `reward_figures`."""
        probability_N, target_N, category_N = map(dim_zero_cat, (self.probability, self.target, self.category))
        return reward_figures(probability_N, target_N, category_N, self.threshold)


def reward_figures(
    probability_N: Tensor,
    target_N: Tensor,
    category_N: Tensor,
    threshold: float = 0.5,
    scene_N: Tensor | None = None,
) -> dict[str, Tensor]:
    """Each figure by name, as a scalar tensor: fractions in [0, 1], and counts.

    The counts are tp, fp, tn, fn, rows and, of each category, rows_CATEGORY. A figure whose denominator is zero is 0.
    `acceptance_rate` is the share of rows that are decided to be accepted,
    `people_acceptance_rate` the share that people accepted.

    Args:
        probability_N: (N,) floating, P(accepted).
        target_N: (N,) int64, 1 for accepted.
        category_N: (N,) int64, the index of each row's category.
        threshold: A probability above it counts as accepted.
        scene_N: (N,) int64, the scene of each row: for intervals of accuracy and F1, see `decision_intervals`.
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
        figures[f"agreement_{category}"] = agreement
        figures[f"rows_{category}"] = mine.sum()
    if scene_N is not None:
        figures |= decision_intervals(decided_N, target_N, scene_N)
    return {name: value.double() for name, value in figures.items()}


def decision_intervals(decided_N: Tensor, target_N: Tensor, scene_N: Tensor) -> dict[str, Tensor]:
    """The number of scenes, and 95% intervals of accuracy and F1 over scenes drawn with replacement.

    Rows of one scene are alike, so rows drawn one by one would make the intervals far too narrow.

    Args:
        decided_N: (N,) int64, 1 where the decision is positive.
        target_N: (N,) int64, 1 where it should be.
        scene_N: (N,) int64, the scene of each row.
    """
    counts_G4 = _grouped_counts(decided_N, target_N == decided_N, scene_N)
    intervals = group_intervals(counts_G4, BOOTSTRAP_RESAMPLES)
    kept = {name: value for name, value in intervals.items() if name.startswith(("accuracy_", "f1_"))}
    return {"scenes": torch.tensor(len(counts_G4)), **kept}


def _grouped_counts(decided_N: Tensor, right_N: Tensor, group_N: Tensor) -> Tensor:
    """True and false positives, true and false negatives of each group, (G, 4) int64.

    Args:
        decided_N: (N,) int64, 1 where the decision is positive.
        right_N: (N,), 1 where it is right, 0 where it is wrong; anything else counts as nothing.
        group_N: (N,) int64.
    """
    kinds = [(1, 1), (1, 0), (0, 1), (0, 0)]
    kind_N4 = torch.stack([(decided_N == offer) & (right_N == right) for offer, right in kinds], dim=1)
    names_G, group_N = group_N.unique(return_inverse=True)
    return kind_N4.new_zeros((len(names_G), 4), dtype=torch.int64).index_add(0, group_N, kind_N4.long())


# Agents on 227 events of the 12 test traces, as true positives, false positives, true negatives, false negatives:
# the counts that the row real_average of each file in eval/results of thunlp/ProactiveAgent (commit 50940be) follows
# from; each row has one such solution only. Their judge was the published 8B reward model.
_PUBLISHED_AGENT_COUNTS: dict[str, tuple[int, int, int, int]] = {
    "Qwen2-7B-Proactive": (111, 112, 4, 0),
    "LLaMA-3.1-8B-Proactive": (96, 115, 12, 4),
    "Qwen2-72B-Instruct": (95, 67, 50, 15),
    "Qwen2-7B-Instruct": (99, 128, 0, 0),
    "GPT-4o": (112, 114, 1, 0),
    "GPT-4o-mini": (78, 147, 2, 0),
    "GPT-3.5-Turbo": (90, 132, 3, 2),
    "Claude-3.5-Sonnet": (86, 119, 19, 3),
    "Claude-3-Sonnet": (67, 67, 54, 39),
    "LLaMA-3.1-8B": (80, 144, 2, 1),
    "LLaMA-3.1-70B": (61, 103, 38, 25),
    "LLaMA-3-8B": (62, 97, 38, 30),
    "LLaMA-3-70B": (61, 135, 19, 12),
    "DeepSeek-7B-Chat": (80, 108, 28, 11),
}
NO_VERDICT = -1


class AgentMetrics(Metric):
    """How an agent's decisions fare with a judge, event by event.

    A proposal that is accepted is a true positive, one that is rejected a false positive; null that is accepted a
    true negative, null that is rejected a false negative. Of an event with several candidates the one counts that
    `deciding_candidate` says.

    Args:
        bootstrap: Resamples of whole traces for 95% percentile intervals; none are computed if 0.
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
                where it says nothing.
            trace: (N,) int64, the trace that each event belongs to; each event is a trace of its own if not given.
        """
        proposed_NK, accepted_NK = (column.long().reshape(len(column), -1) for column in (proposed, accepted))
        if trace is None:
            first = -1 - sum(len(column) for column in self.trace)
            trace = first - torch.arange(len(proposed_NK), device=proposed.device)
        self.proposed.append(proposed_NK)
        self.accepted.append(accepted_NK)
        self.trace.append(trace)

    def compute(self) -> dict[str, Tensor]:
        """The figures of `agent_figures` over all K candidates; where K > 1 also over the first k, as `f1@k`."""
        proposed_NK, accepted_NK, trace_N = map(dim_zero_cat, (self.proposed, self.accepted, self.trace))
        if proposed_NK.shape[1] == 1:
            return agent_figures(proposed_NK, accepted_NK, trace_N, self.bootstrap)
        figures: dict[str, Tensor] = {}
        for k in range(1, proposed_NK.shape[1] + 1):
            at_k = agent_figures(proposed_NK[:, :k], accepted_NK[:, :k], trace_N, self.bootstrap)
            figures |= {f"{name}@{k}": value for name, value in at_k.items()} | at_k
        return figures


def deciding_candidate(accepted_NK: Tensor) -> Tensor:
    """(N,) int64: which of an event's candidates counts: the first that is accepted, else the first with a verdict.

    So an event is accepted if any of its candidates is, and one that is accepted stays so with more candidates.
    """
    rank_NK = 2 * (accepted_NK == 1).long() + (accepted_NK == 0).long()
    return rank_NK.argmax(dim=1)  # the first of the greatest


def agent_figures(proposed_NK: Tensor, accepted_NK: Tensor, trace_N: Tensor, bootstrap: int = 0) -> dict[str, Tensor]:
    """Each figure by name, as a scalar tensor: fractions in [0, 1], and counts.

    An event without a verdict is in `events` and `undecided`, and in no other figure.

    Args:
        proposed_NK: (N, K) int64, 1 where a candidate is text.
        accepted_NK: (N, K) int64, 1 accepted, 0 rejected, `NO_VERDICT` neither.
        trace_N: (N,) int64, the trace that each event belongs to.
        bootstrap: Resamples of the traces for intervals; none if 0.
    """
    chosen_N1 = deciding_candidate(accepted_NK)[:, None]
    proposed_N, accepted_N = proposed_NK.gather(1, chosen_N1)[:, 0], accepted_NK.gather(1, chosen_N1)[:, 0]
    counts_T4 = _grouped_counts(proposed_N, accepted_N, trace_N)
    figures = {
        **count_figures(counts_T4.sum(0)),
        **dict(zip(("tp", "fp", "tn", "fn"), counts_T4.sum(0), strict=True)),
        "events": torch.tensor(len(proposed_N)),
        "undecided": (accepted_N == NO_VERDICT).sum(),
        "traces": torch.tensor(len(counts_T4)),
    }
    if bootstrap:
        figures |= group_intervals(counts_T4, bootstrap)
    return {name: value.double() for name, value in figures.items()}


def count_figures(counts: Tensor) -> dict[str, Tensor]:
    """Figures of confusion counts (..., 4): true positives, false positives, true negatives, false negatives.

    A figure whose denominator is zero is 0. `accept_rate` is the share of proposals that are accepted, which is the
    precision; it has a name of its own in the published tables.
    """
    tp, fp, tn, fn = counts.double().unbind(-1)

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)

    return {
        "recall": share(tp, tp + fn),
        "precision": share(tp, tp + fp),
        "accuracy": share(tp + tn, tp + fp + tn + fn),
        "false_alarm": share(fp, tp + fp),
        "f1": share(2 * tp, 2 * tp + fp + fn),
        "accept_rate": share(tp, tp + fp),
    }


def group_intervals(counts_G4: Tensor, resamples: int, seed: int = 0) -> dict[str, Tensor]:
    """95% percentile intervals over groups drawn with replacement, for rows of one scene or trace are alike.

    Args:
        counts_G4: (G, 4) int64, each group's counts as `count_figures` takes them.
        resamples: How many times G groups are drawn.
        seed: The same seed gives the same intervals.

    Returns:
        NAME_low and NAME_high for each figure of `count_figures`; none of a single group, which shows no spread.
    """
    if len(counts_G4) < 2:
        return {}
    generator = torch.Generator().manual_seed(seed)
    groups_RG = torch.randint(len(counts_G4), (resamples, len(counts_G4)), generator=generator).to(counts_G4.device)
    counts_R4 = torch.cat([counts_G4[part].sum(1) for part in groups_RG.split(100)])  # at once it may take much memory
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64, device=counts_G4.device)
    intervals: dict[str, Tensor] = {}
    for name, values_R in count_figures(counts_R4).items():
        low, high = torch.quantile(values_R, bounds)
        intervals |= {f"{name}_low": low, f"{name}_high": high}
    return intervals


PUBLISHED_AGENT_ROWS: dict[str, dict[str, float]] = {
    name: dict(zip(("tp", "fp", "tn", "fn", "events"), (*counts, sum(counts)), strict=True))
    | {figure: float(value) for figure, value in count_figures(torch.tensor(counts)).items()}
    for name, counts in _PUBLISHED_AGENT_COUNTS.items()
}
