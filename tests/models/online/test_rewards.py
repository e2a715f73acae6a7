"""Rewards from a judge's probabilities, and advantages within a group."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.corpus.answers import Answer
from datamodules.corpus.records import Event
from models.online.rewards import JudgeReward, advantages

HISTORY = (Event(time="1", event="The user opens a file."),)


class FixedScorer:
    """Gives known probabilities, and keeps what it was asked."""

    def __init__(self, *probabilities: float) -> None:
        self.probabilities = list(probabilities)
        self.proposals: list[str | None] = []

    def score(self, pairs):  # type: ignore[no-untyped-def]
        self.proposals += [pair.proposal for pair in pairs]
        return [self.probabilities.pop(0) for _ in pairs]


def reward(cost_ratio: float, *probabilities: float) -> JudgeReward:
    made = JudgeReward.__new__(JudgeReward)
    made.cost_ratio = cost_ratio
    made._scorer = FixedScorer(*probabilities)  # type: ignore[assignment]
    return made


def test_offers_and_silence_have_their_expected_value_as_reward() -> None:
    judge = reward(2.0, 0.9, 0.25, 0.6)
    answers = [Answer(proposal="A"), Answer(proposal="B"), Answer(proposal=None), None]
    found = judge.rewards([HISTORY] * 4, answers)
    expected = [0.9 - 2 * 0.1, 0.25 - 2 * 0.75, 0.6, -2.0]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))
    assert judge._scorer.proposals == ["A", "B", None]  # type: ignore[attr-defined]


@given(st.lists(st.lists(st.floats(-3, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_advantages_have_mean_zero_and_deviation_one_or_are_zero(rewards: list[list[float]]) -> None:
    reward_HK = torch.tensor(rewards, dtype=torch.float64)
    found = advantages(reward_HK)
    assert torch.allclose(found.mean(1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-6)
    for row, deviation in zip(found, reward_HK.std(1), strict=True):
        if deviation > 1e-6:
            assert torch.allclose(row.std(), torch.ones((), dtype=torch.float64), atol=1e-6)
        else:
            assert not row.any()
    assert torch.equal(found.gather(1, reward_HK.argmax(1, keepdim=True))[:, 0], found.max(1).values)
