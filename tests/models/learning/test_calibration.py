"""Temperature and threshold, compared with brute force, and for degenerate rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamodules.errors import UserError
from models.learning.calibration import TEMPERATURE_RANGE, calibrated, fit_temperature, fit_threshold

LOW, HIGH = TEMPERATURE_RANGE
GRID = [LOW * (HIGH / LOW) ** (place / 200) for place in range(201)]
any_probability = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])
# What calibrated() can give, neighbours in floating point included.
near = st.sampled_from([math.nextafter(0.5, 0), 0.5, math.nextafter(0.5, 1), math.nextafter(1, 0), 1.0])
possible_probability = st.floats(1e-300, 1) | near


def rows_of(probability: st.SearchStrategy[float]) -> st.SearchStrategy[list[tuple[float, bool]]]:
    return st.lists(st.tuples(probability, st.booleans()), min_size=1, max_size=25)


def columns(rows: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    probability, target = zip(*rows, strict=True)
    return torch.tensor(probability, dtype=torch.float64), torch.tensor(target).long()


def loss(probability: Tensor, target: Tensor, temperature: float) -> float:
    log_odds = torch.logit(probability, eps=1e-12) / temperature
    return float(torch.nn.functional.binary_cross_entropy_with_logits(log_odds, target.double()))


def f1(rows: list[tuple[float, bool]], threshold: float) -> float:
    right = sum(p > threshold and accepted for p, accepted in rows)
    wrong = sum((p > threshold) != accepted for p, accepted in rows)
    return 2 * right / (2 * right + wrong) if right else 0.0


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5, 8.0])
def test_the_temperature_recovers_a_known_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    log_odds = torch.randn(20_000, generator=generator, dtype=torch.float64) * 2
    target = (torch.rand(20_000, generator=generator) < torch.sigmoid(log_odds)).long()
    too_sure = torch.sigmoid(log_odds * scale)
    temperature = fit_temperature(too_sure, target)
    assert temperature == pytest.approx(scale, rel=0.06)
    torch.testing.assert_close(calibrated(too_sure, temperature), torch.sigmoid(log_odds), atol=0.03, rtol=0)


@given(st.lists(st.tuples(any_probability, st.booleans(), st.integers(1, 4)), min_size=1, max_size=12))
@settings(deadline=None, max_examples=40)
def test_a_row_with_a_weight_counts_as_that_many_rows(rows: list[tuple[float, bool, int]]) -> None:
    probability, target = columns([(p, accepted) for p, accepted, _ in rows])
    weight = torch.tensor([count for _, _, count in rows])
    many = columns([(p, accepted) for p, accepted, count in rows for _ in range(count)])
    temperature = fit_temperature(probability, target, weight)
    assert loss(*many, temperature) <= loss(*many, fit_temperature(*many)) * 1.001 + 1e-4
    assert fit_threshold(probability, target, weight) == fit_threshold(*many)


@given(rows_of(any_probability))
@settings(deadline=None, max_examples=60)
def test_no_other_temperature_in_range_makes_the_targets_likelier(rows: list[tuple[float, bool]]) -> None:
    probability, target = columns(rows)
    temperature = fit_temperature(probability, target)
    assert LOW * 0.999 <= temperature <= HIGH * 1.001
    best = min(loss(probability, target, other) for other in GRID)
    assert loss(probability, target, temperature) <= best * 1.001 + 1e-4


@pytest.mark.parametrize(
    ("probability", "target", "least", "greatest"),
    [
        ([0.2, 0.3, 0.8, 0.9], [0, 0, 1, 1], LOW, 0.1),  # always right: as good as certain
        ([0.0, 1.0], [0, 1], LOW, 1.0),
        ([0.2, 0.3, 0.8, 0.9], [1, 1, 0, 0], HIGH, HIGH),  # always wrong: as unsure as allowed
        ([0.0, 1.0], [1, 0], HIGH, HIGH),
        ([0.9, 0.8], [1, 1], LOW, 0.1),  # all accepted
        ([0.9, 0.8], [0, 0], HIGH, HIGH),  # all rejected
        ([0.8, 0.8, 0.8, 0.8, 0.8], [1, 1, 1, 1, 0], 1.0, 1.0),  # constant and right as it is
        ([0.5, 0.5], [0, 1], LOW, HIGH),  # no temperature changes anything
    ],
)
def test_degenerate_rows_give_a_temperature_in_range(
    probability: list[float], target: list[int], least: float, greatest: float
) -> None:
    temperature = fit_temperature(torch.tensor(probability, dtype=torch.float64), torch.tensor(target))
    assert least * 0.999 <= temperature <= greatest * 1.001


def test_the_temperature_is_fitted_in_inference_mode() -> None:
    """Lightning validates in inference mode, whose tensors record no gradients."""
    with torch.inference_mode():
        probability, target = torch.tensor([0.99, 0.99, 0.99, 0.01]), torch.tensor([1, 0, 1, 0])
        assert fit_temperature(probability, target) > 1.5


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0, 20.0])
def test_calibration_divides_the_log_odds_and_changes_no_decision(temperature: float) -> None:
    probability = torch.tensor([0.1, 0.4, 0.5, 0.8], dtype=torch.float64)
    result = calibrated(probability, temperature)
    for before, after in zip(probability.tolist(), result.tolist(), strict=True):
        odds = (before / (1 - before)) ** (1 / temperature)
        assert after == pytest.approx(odds / (1 + odds), rel=1e-9)
    assert ((result > 0.5) == (probability > 0.5)).all()
    assert (result.diff() > 0).all()


def test_certainty_stays_a_probability() -> None:
    result = calibrated(torch.tensor([0.0, 1.0]), LOW)
    assert ((result >= 0) & (result <= 1)).all()


@given(rows_of(possible_probability))
@settings(deadline=None, max_examples=200)
def test_no_other_threshold_has_a_greater_f1(rows: list[tuple[float, bool]]) -> None:
    threshold = fit_threshold(*columns(rows))
    assert 0 <= threshold <= 1
    best = max(f1(rows, other) for other in [0.0, *(p for p, _ in rows)])
    assert f1(rows, threshold) == pytest.approx(best, abs=1e-6) or not any(accepted for _, accepted in rows)


@pytest.mark.parametrize(
    ("probability", "target", "expected"),
    [
        ([0.1, 0.3, 0.7, 0.9], [0, 0, 1, 1], 0.5),  # halfway between the two that it parts
        ([0.2, 0.4], [0, 0], 0.5),  # nobody accepted anything
        ([0.2, 0.4], [1, 1], 0.1),  # all accepted: below the least
        ([0.6, 0.6, 0.6], [1, 0, 1], 0.3),  # constant
        ([0.0, 1.0], [0, 1], 0.5),
    ],
)
def test_the_threshold_lies_between_rows(probability: list[float], target: list[int], expected: float) -> None:
    threshold = fit_threshold(torch.tensor(probability, dtype=torch.float64), torch.tensor(target))
    assert threshold == pytest.approx(expected)


@pytest.mark.parametrize("fitted", [fit_temperature, fit_threshold])
def test_nan_is_refused(fitted: object) -> None:
    """A temperature of NaN would be saved with the weights and make all later probabilities NaN."""
    with pytest.raises((UserError, ValueError)):
        fitted(torch.tensor([0.2, math.nan, 0.7], dtype=torch.float64), torch.tensor([0, 1, 1]))  # type: ignore[operator]
