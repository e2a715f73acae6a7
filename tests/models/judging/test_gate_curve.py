"""The gate: its threshold is the one that costs least, and its curve runs from all offers to none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.errors import UserError
from models.judging.gate_curve import MAX_POINTS, Gated, gate_threshold
from models.learning.metrics import agent_metrics
from tests.datamodules.conftest import few_examples


@few_examples
@given(st.floats(0, 100), st.floats(0, 1))
def test_the_threshold_minimizes_the_expected_cost(cost_ratio: float, probability: float) -> None:
    offering, holding_back = (1 - probability) * cost_ratio, probability
    if abs(offering - holding_back) > 1e-9:
        assert (probability >= gate_threshold(cost_ratio)) is (offering < holding_back)


def test_thresholds_follow_from_cost_ratios_and_an_invalid_ratio_is_refused() -> None:
    assert [gate_threshold(ratio) for ratio in (0, 1, 3)] == [0, 0.5, 0.75]
    for ratio in (-1, float("inf"), float("nan")):
        with pytest.raises(UserError, match="--cost-ratio: expected 0 or more"):
            gate_threshold(ratio)


def by_hand() -> Gated:
    """An offer of P 0.2 rejected (null is right), one of 0.9 accepted (null is not), and a null that is right."""
    return Gated(
        proposed=torch.tensor([[1], [1], [0]]),
        accepted=torch.tensor([[0], [1], [1]]),
        probability=torch.tensor([[0.2], [0.9], [0.0]], dtype=torch.float64),
        null_accepted=torch.tensor([1, 0, 1]),
        trace=torch.tensor([0, 0, 1]),
    )


def test_held_back_proposals_count_as_null() -> None:
    proposed, accepted = by_hand().at(0.5)
    assert proposed.tolist() == [[0], [1], [0]]
    assert accepted.tolist() == [[1], [1], [1]]
    proposed, accepted = by_hand().at(0.2)  # not below it
    assert proposed.tolist() == [[1], [1], [0]]


def test_the_curve_equals_one_computed_by_hand() -> None:
    curve = by_hand().curve()
    counts = [tuple(int(point[name]) for name in ("tp", "fp", "tn", "fn")) for point in curve]
    assert counts == [(1, 1, 1, 0), (1, 0, 2, 0), (0, 0, 2, 1)]
    assert [round(point["threshold"], 6) for point in curve] == [0, 0.2, 0.9]


EVENT = st.tuples(st.integers(0, 1), st.integers(-1, 1), st.floats(0, 1), st.integers(-1, 1))


@few_examples
@given(st.lists(EVENT, min_size=1, max_size=20))
def test_the_curve_runs_from_no_gate_to_never_proposing(drawn: list[tuple[int, int, float, int]]) -> None:
    proposed, accepted, probability, null = (torch.tensor(column) for column in zip(*drawn, strict=True))
    null = torch.where(proposed == 0, accepted, null)  # one judge, one verdict on null
    made = Gated(proposed[:, None], accepted[:, None], probability.double()[:, None], null, torch.arange(len(drawn)))
    curve = made.curve()
    offers = [point["tp"] + point["fp"] for point in curve]
    assert offers == sorted(offers, reverse=True)
    names = ("tp", "fp", "tn", "fn")
    as_it_is = agent_metrics(proposed[:, None], accepted[:, None], made.trace)
    never = agent_metrics(torch.zeros_like(proposed)[:, None], null[:, None], made.trace)
    assert [curve[0][name] for name in names] == [float(as_it_is[name]) for name in names]
    assert [curve[-1][name] for name in names] == [float(never[name]) for name in names]


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    count = 3 * MAX_POINTS
    ones = torch.ones((count, 1), dtype=torch.int64)
    probability = torch.rand((count, 1), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curve = Gated(ones, ones, probability, torch.zeros(count, dtype=torch.int64), torch.arange(count)).curve()
    assert len(curve) == MAX_POINTS + 1
    assert (curve[0]["tp"], curve[-1]["tp"]) == (count, 0)
