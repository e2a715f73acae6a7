"""The threshold of a gate, and the metrics of an agent over all thresholds.

A gate holds back an offer if showing it costs more on average than holding it back. The unit of cost is a missed need:
an offer that was held back, although the user would have accepted it. A false alarm, an offer that the user rejects,
costs C units. With p = P(accepted), showing the offer costs (1 - p) C on average, and holding it back costs p. So the
gate shows an offer if and only if p >= (1 - p) C, that is p >= C / (1 + C).

Shape legend: N events, K candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.errors import UserError
from models.learning.metrics import agent_metrics

MAX_POINTS = 200  # of a curve


def gate_threshold(cost_ratio: float) -> float:
    """The minimum P(accepted) at which an offer is worth its cost.

    Args:
        cost_ratio: Cost of a false alarm divided by the cost of a missed need; 0 or more.

    Examples:
        >>> gate_threshold(1.0), gate_threshold(3.0)
        (0.5, 0.75)
    """
    if not 0 <= cost_ratio < float("inf"):
        raise UserError(f"--cost-ratio: expected 0 or more, got {cost_ratio}", "1 weighs both mistakes equally.")
    return cost_ratio / (1 + cost_ratio)


@dataclass(frozen=True)
class Gated:
    """Candidates that a gate can hold back, with the verdicts on them and on silence.

    Attributes:
        proposed: (N, K) int64, 1 where a candidate is text.
        accepted: (N, K) int64, the judge's verdict on the candidate as in `AgentMetrics`.
        probability: (N, K) float64, the gate's P(accepted); any value where the candidate is null.
        null_accepted: (N,) int64, the judge's verdict on null.
        trace: (N,) int64.
    """

    proposed: Tensor
    accepted: Tensor
    probability: Tensor
    null_accepted: Tensor
    trace: Tensor

    def at(self, threshold: float) -> tuple[Tensor, Tensor]:
        """`proposed` and `accepted` after every proposal below the threshold is replaced with null."""
        held_NK = (self.proposed == 1) & (self.probability < threshold)
        null_NK = self.null_accepted[:, None].expand_as(held_NK)
        return self.proposed.masked_fill(held_NK, 0), torch.where(held_NK, null_NK, self.accepted)

    def curve(self) -> list[dict[str, float]]:
        """Metrics at each distinct threshold, in increasing order from 0, where nothing is held back."""
        found = self.probability[self.proposed == 1].unique()
        if len(found) > MAX_POINTS:
            found = found[torch.linspace(0, len(found) - 1, MAX_POINTS).round().long()]
        # Just above each probability, so that proposals with this probability are held back.
        thresholds = [0.0, *torch.nextafter(found, torch.tensor(2.0, dtype=found.dtype)).tolist()]
        return [
            {"threshold": threshold}
            | {name: float(value) for name, value in agent_metrics(*self.at(threshold), self.trace).items()}
            for threshold in thresholds
        ]
