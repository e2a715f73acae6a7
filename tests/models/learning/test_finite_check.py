"""A value that is not finite is reported one step late, and from then on."""

import pytest
import torch

from models.learning.finite_check import FiniteCheck


def test_without_values_there_is_no_problem() -> None:
    assert FiniteCheck().problem() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_value_that_is_not_finite_is_reported_with_its_step_from_then_on(bad: float) -> None:
    check = FiniteCheck()
    check.note(3, {"the loss": torch.tensor(1.0), "the gradient norm": torch.tensor(2.0)})
    assert check.problem() is None
    check.note(4, {"the loss": torch.tensor(1.0), "the gradient norm": torch.tensor(bad, dtype=torch.bfloat16)})
    for _ in range(2):
        found = check.problem()
        assert found is not None
        name, value, step = found
        assert (name, step) == ("the gradient norm", 4)
        assert value == pytest.approx(bad, nan_ok=True)
    check.note(5, {"the loss": torch.tensor(1.0)})
    assert check.problem() is not None
