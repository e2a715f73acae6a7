"""Rewards of an agent's answers from a reward classifier, and advantages within the answers to one history.

Shape legend: H histories, K candidates.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from datamodules.corpus.answers import Answer
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Pair
from models.judging.scorer import Scorer
from models.judging.weights import load_weights
from models.learning.reward_classifier import RewardClassifier

MIN_DEVIATION = 1e-6  # a smaller standard deviation of rewards is due to rounding


class JudgeReward:
    """Rewards answers by a judge's P(accepted).

    Args:
        path: A run, checkpoint or export of a reward classifier.
        option: The option that named it.
        cost_ratio: Cost of a rejected offer relative to the value of an accepted one.
        device: The device of the judge.
    """

    def __init__(self, path: str, option: str, cost_ratio: float, device: torch.device) -> None:
        weights = load_weights((RewardClassifier,), Path(path), option)
        self.digest = weights.digest
        self.scenes = set(weights.state.get("training_scenes", ()))
        self.histories = set(weights.state["training_histories"])
        self.cost_ratio = cost_ratio
        self._scorer = Scorer(weights, device)

    def rewards(self, histories: Sequence[Sequence[Event]], answers: Sequence[Answer | None]) -> Tensor:
        """The reward of each answer after its history, (N,) float64.

        With cost ratio c, an offer with P(accepted) p has the reward p - c (1 - p), its expected value. Silence has the
        reward P(null accepted). An unreadable answer has the reward -c, that of an offer that is never accepted.
        """
        pairs = [
            Pair(tuple(history), answer.proposal)
            for history, answer in zip(histories, answers, strict=True)
            if answer is not None
        ]
        probabilities = iter(self._scorer.score(pairs))
        rewards = [self._reward(answer, next(probabilities) if answer is not None else 0.0) for answer in answers]
        return torch.tensor(rewards, dtype=torch.float64)

    def _reward(self, answer: Answer | None, probability: float) -> float:
        if answer is not None and answer.proposal is None:
            return probability
        return probability - self.cost_ratio * (1 - probability)


def advantages(reward_HK: Tensor) -> Tensor:
    """Rewards relative to those of all answers to the same history, in standard deviations (arXiv 2402.03300): (H, K).

    If all rewards of a history are equal, the advantages are 0.

    Examples:
        >>> advantages(torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.5]]))
        tensor([[ 1.,  0., -1.],
                [ 0.,  0.,  0.]])
    """
    deviation_H1 = reward_HK.std(dim=1, keepdim=True)
    centered_HK = reward_HK - reward_HK.mean(dim=1, keepdim=True)
    return torch.where(deviation_H1 > MIN_DEVIATION, centered_HK / deviation_H1.clamp(min=MIN_DEVIATION), 0.0)
