"""Metrics of an agent by teacher forcing: the loss of given answers, and whether the agent would make an offer.

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
from models.learning.metrics import GatheredRows, decision_intervals
from models.networks.devices import as_float64


class AnswerLosses(GatheredRows):
    """The losses of the answers of rows."""

    columns = ("loss", "tokens", "kind", "help_needed", "row")

    def update(self, loss: Tensor, tokens: Tensor, kind: Tensor, help_needed: Tensor, row: Tensor) -> None:
        """Add rows.

        Args:
            loss: (R,) floating, summed over the tokens of each answer.
            tokens, kind, help_needed: (R,) int64, see `datamodules.batching.steps.AgentBatch`.
            row: (R,) int64, the index of each row, or `FILLER`.
        """
        self.add(as_float64(loss), tokens, kind, help_needed, row)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of `answer_losses` and `proposal_metrics`."""
        rows = self.stored_rows()
        return answer_losses(rows) | proposal_metrics(*decisions(rows))


def answer_losses(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean loss per token in nats: `loss` of all answers, `loss_text` of offers, `loss_null` of null answers.

    A loss is absent if there is no such answer.
    """
    kinds = {"loss": list(AnswerKind)[:3], "loss_text": [AnswerKind.TEXT], "loss_null": [AnswerKind.NULL]}
    losses: dict[str, Tensor] = {}
    for name, counted in kinds.items():
        mine = torch.isin(rows["kind"], torch.tensor([int(kind) for kind in counted]))
        if mine.any():
            losses[name] = rows["loss"][mine].sum() / rows["tokens"][mine].sum()
    return losses


def decisions(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """1 - P(null) after each probed history, (N,) float64, and whether help was needed there, (N,) int64."""
    probe = rows["kind"] == AnswerKind.PROBE
    return -torch.expm1(-rows["loss"][probe]), rows["help_needed"][probe]


def probed_rows(rows: dict[str, Tensor]) -> Tensor:
    """The index of the row of each probed history, (N,) int64, in the order of `decisions`."""
    return rows["row"][rows["kind"] == AnswerKind.PROBE]


def proposal_metrics(
    offers_N: Tensor, needed_N: Tensor, threshold: float = 0.5, scene_N: Tensor | None = None
) -> dict[str, Tensor]:
    """How well decisions to make an offer match whether help was needed. Help needed is the positive class.

    Args:
        offers_N: (N,) floating, the probability of an offer.
        needed_N: (N,) int64, 1 where help was needed.
        threshold: A probability above it counts as an offer.
        scene_N: (N,) int64, the scene of each history, for intervals of accuracy and F1.
    """
    proposed_N = (offers_N > threshold).long()
    both_classes = bool(needed_N.any()) and not bool(needed_N.all())
    intervals = {} if scene_N is None else decision_intervals(proposed_N, needed_N, scene_N)
    return {
        "accuracy": binary_accuracy(proposed_N, needed_N),
        "precision": binary_precision(proposed_N, needed_N),
        "recall": binary_recall(proposed_N, needed_N),
        "f1": binary_f1_score(proposed_N, needed_N),
        "auroc": binary_auroc(offers_N, needed_N) if both_classes else torch.tensor(0.0),
        "proposed": proposed_N.double().mean(),
        "help_needed": needed_N.double().mean(),
        "histories": torch.tensor(float(len(needed_N))),
        **intervals,
    }
