"""Figures of an agent's answers by teacher forcing: how likely it finds them, and whether it would have proposed.

Shape legend: R rows of a batch, N probes.
"""

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_f1_score,
    binary_precision,
    binary_recall,
)

from datamodules.batching.answer_rows import AnswerKind
from models.learning.metrics import KeptRows, decision_intervals


class AnswerLosses(KeptRows):
    """The losses of answers."""

    columns = ("loss", "tokens", "kind", "help_needed", "row")

    def update(self, loss: Tensor, tokens: Tensor, kind: Tensor, help_needed: Tensor, row: Tensor) -> None:
        """Add rows: the loss (R,) floating, summed over its tokens; the others (R,) int64, see AgentBatch."""
        self.keep(loss.double(), tokens, kind, help_needed, row)

    def compute(self) -> dict[str, Tensor]:
        """The figures of `answer_losses` and `decision_figures`."""
        rows = self.rows()
        return answer_losses(rows) | decision_figures(*decisions(rows))


def answer_losses(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean loss of a token of all answers, and of those in text and of null alone; nats; absent where none are."""
    kinds = {"loss": list(AnswerKind)[:3], "loss_text": [AnswerKind.TEXT], "loss_null": [AnswerKind.NULL]}
    figures: dict[str, Tensor] = {}
    for name, counted in kinds.items():
        mine = torch.isin(rows["kind"], torch.tensor([int(kind) for kind in counted], device=rows["kind"].device))
        if mine.any():
            figures[name] = rows["loss"][mine].sum() / rows["tokens"][mine].sum()
    return figures


def decisions(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """1 - P(null) after each probed history, (N,) float64, and whether help was needed, (N,) int64."""
    probe = rows["kind"] == AnswerKind.PROBE
    return -torch.expm1(-rows["loss"][probe]), rows["help_needed"][probe]


def probed_rows(rows: dict[str, Tensor]) -> Tensor:
    """The row of each probed history, (N,) int64, in the order of `decisions`."""
    return rows["row"][rows["kind"] == AnswerKind.PROBE]


def decision_figures(
    offers_N: Tensor, needed_N: Tensor, threshold: float = 0.5, scene_N: Tensor | None = None
) -> dict[str, Tensor]:
    """How well the decision to propose fits whether help was needed; help needed is the positive class.

    Args:
        offers_N: (N,) floating, the probability of a proposal.
        needed_N: (N,) int64, 1 where help was needed.
        threshold: A probability above it counts as a proposal.
        scene_N: (N,) int64, the scene of each history: for intervals of accuracy and F1.
    """
    proposed_N = (offers_N > threshold).long()
    both = bool(needed_N.any()) and not bool(needed_N.all())
    intervals = {} if scene_N is None else decision_intervals(proposed_N, needed_N, scene_N)
    return {
        "accuracy": binary_accuracy(proposed_N, needed_N),
        "precision": binary_precision(proposed_N, needed_N),
        "recall": binary_recall(proposed_N, needed_N),
        "f1": binary_f1_score(proposed_N, needed_N),
        "auroc": binary_auroc(offers_N, needed_N) if both else torch.tensor(0.0),
        "proposed": proposed_N.double().mean(),
        "help_needed": needed_N.double().mean(),
        "histories": torch.tensor(float(len(needed_N))),
        **intervals,
    }
