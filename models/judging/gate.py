"""The gate: holding proposals back that are likelier to annoy than to help.

Let a false alarm (an offer that the user rejects) cost C times what a missed need (an offer that the user would have
accepted, and that was held back) costs. With p = P(accepted), making an offer costs (1 - p) C on average, holding it
back costs p. So it is right to offer if and only if p >= (1 - p) C, that is p >= C / (1 + C).

Shape legend: N events, K candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.errors import UserError
from models.learning.metrics import agent_figures

MOST_POINTS = 200  # of a curve


def gate_threshold(cost_ratio: float) -> float:
    """The least P(accepted) at which an offer is worth making.

    Args:
        cost_ratio: What a false alarm costs, in missed needs; 0 or more.
    """
    if not 0 <= cost_ratio < float("inf"):
        raise UserError(f"--cost-ratio: expected 0 or more, got {cost_ratio}", "1 weighs both mistakes alike.")
    return cost_ratio / (1 + cost_ratio)


@dataclass(frozen=True)
class Gated:
    """Candidates that a gate can hold back, and how they fare if it does.

    Attributes:
        proposed: (N, K) int64, 1 where a candidate is text.
        accepted: (N, K) int64, the judge's verdict on the candidate as in `AgentMetrics`.
        probability: (N, K) float64, what the gate thinks P(accepted) is; of null anything.
        null_accepted: (N,) int64, the judge's verdict on null.
        trace: (N,) int64.
    """

    proposed: Tensor
    accepted: Tensor
    probability: Tensor
    null_accepted: Tensor
    trace: Tensor

    def at(self, threshold: float) -> tuple[Tensor, Tensor]:
        """`proposed` and `accepted` with every proposal below the threshold turned into null."""
        held_NK = (self.proposed == 1) & (self.probability < threshold)
        null_NK = self.null_accepted[:, None].expand_as(held_NK)
        return self.proposed.masked_fill(held_NK, 0), torch.where(held_NK, null_NK, self.accepted)

    def curve(self) -> list[dict[str, float]]:
        """Figures at each threshold that makes a difference, from 0, where nothing is held back, upwards."""
        found = self.probability[self.proposed == 1].unique()
        if len(found) > MOST_POINTS:
            found = found[torch.linspace(0, len(found) - 1, MOST_POINTS).round().long()]
        # Just above each probability, so that the proposals with it are held back.
        thresholds = [0.0, *torch.nextafter(found, torch.tensor(2.0, dtype=found.dtype)).tolist()]
        return [
            {"threshold": threshold}
            | {name: float(value) for name, value in agent_figures(*self.at(threshold), self.trace).items()}
            for threshold in thresholds
        ]
