"""Losses and metrics of preference training.

A *log-ratio* is the log-probability of an answer under the agent minus that under its reference, the agent before
preference training. Beta times the log-ratio is the answer's implicit reward (Rafailov et al. 2023, arXiv 2305.18290).

Shape legend: P pairs or judged proposals.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from models.learning.metrics import decision_intervals


def dpo_losses(chosen_P: Tensor, rejected_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, (P,): direct preference optimization (DPO, arXiv 2305.18290).

    Args:
        chosen_P: (P,) log-ratios of the accepted proposals.
        rejected_P: (P,) log-ratios of the rejected proposals.
        beta: Scale of the reward, above 0. A greater one keeps the agent closer to its reference.
        label_smoothing: Assumed probability that a judgment is wrong, 0 to 0.5 (conservative DPO, Mitchell 2023).

    Examples:
        >>> chosen, rejected = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -2.0])
        >>> dpo_losses(chosen, rejected, beta=1.0)  # equal rewards give log 2; the accepted one more gives less
        tensor([0.6931, 0.0181])
    """
    logit_P = beta * (chosen_P - rejected_P)
    return -logsigmoid(logit_P) * (1 - label_smoothing) - logsigmoid(-logit_P) * label_smoothing


def kto_losses(ratio_P: Tensor, accepted_P: Tensor, divergence: Tensor, beta: float, rejected_weight: float) -> Tensor:
    """The loss of each judged proposal, (P,): Kahneman-Tversky optimization (KTO, arXiv 2402.01306).

    Args:
        ratio_P: (P,) log-ratios.
        accepted_P: (P,) bool.
        divergence: Scalar without gradient, at least 0: the estimated KL divergence of the agent from its reference,
            which is the mean log-ratio of mismatched proposals.
        beta: As in `dpo_losses`.
        rejected_weight: Weight of rejected proposals relative to accepted ones.
    """
    sign_P = torch.where(accepted_P, 1.0, -1.0)
    loss_P = 1 - torch.sigmoid(beta * sign_P * (ratio_P - divergence))
    return torch.where(accepted_P, loss_P, rejected_weight * loss_P)


def preference_metrics(
    chosen_P: Tensor, rejected_P: Tensor, beta: float, scene_P: Tensor | None = None
) -> dict[str, Tensor]:
    """How well implicit rewards distinguish accepted from rejected proposals; empty without pairs.

    Args:
        chosen_P: (P,) log-ratios of the accepted proposals.
        rejected_P: (P,) log-ratios of the rejected proposals.
        beta: As in `dpo_losses`.
        scene_P: (P,) int64, the scene of each pair, for an interval of the accuracy.

    Returns:
        `preference_loss`: the mean loss, without label smoothing. `preference_accuracy`: the share of pairs whose
        accepted proposal has the higher reward. `reward_chosen`, `reward_rejected`, `reward_margin`: the mean reward of
        accepted proposals, of rejected ones, and the mean difference. `pairs`: the number of pairs.
    """
    if not len(chosen_P):
        return {}
    margin_P = beta * (chosen_P - rejected_P)
    metrics = {
        "preference_loss": dpo_losses(chosen_P, rejected_P, beta).mean(),
        "preference_accuracy": (margin_P > 0).double().mean(),
        "reward_margin": margin_P.mean(),
        "reward_chosen": beta * chosen_P.mean(),
        "reward_rejected": beta * rejected_P.mean(),
        "pairs": torch.tensor(float(len(margin_P))),
    }
    if scene_P is not None:
        intervals = decision_intervals((margin_P > 0).long(), torch.ones_like(scene_P), scene_P)
        bounds = [(end, intervals.get(f"accuracy_{end}")) for end in ("low", "high")]
        metrics |= {f"preference_accuracy_{end}": value for end, value in bounds if value is not None}
    return metrics
