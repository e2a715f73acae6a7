"""Calibration: a temperature, and the threshold with the greatest F1, fitted on validation rows or a user's answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

TEMPERATURE_RANGE = (0.05, 20.0)
FittedOn = Literal["validation rows", "answers of the user"]
DECISION = 0.5  # a probability above it decides for the positive class: accepted, or help needed


@dataclass(frozen=True)
class Calibration:
    """The calibration of a model, fitted on validation rows, or on the answers in live sessions.

    Attributes:
        temperature: The divisor of log-odds.
        f1_threshold: The threshold on the calibrated probability with the greatest F1. Its metrics are reported next to
            those at `DECISION`. It makes no decisions: if few proposals are good, it accepts far more than people do.
        rows: The number of rows in the fit; None if an old checkpoint does not store it.
        of_rows: The number of rows that could be fitted. It is larger if trainer.limit_val_batches excluded rows.
        fitted_on: What the rows are.
    """

    temperature: float
    f1_threshold: float
    rows: int | None
    of_rows: int | None
    fitted_on: FittedOn = "validation rows"

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None) -> Self | None:
        """The calibration of a checkpoint or export. Older ones have `threshold`, and not all of the other fields."""
        if saved is None:
            return None
        threshold = saved["f1_threshold"] if "f1_threshold" in saved else saved["threshold"]
        return cls(
            saved["temperature"],
            threshold,
            saved.get("rows"),
            saved.get("of_rows"),
            saved.get("fitted_on", get_args(FittedOn)[0]),
        )

    @classmethod
    def fitted(
        cls,
        probability: Tensor,
        target: Tensor,
        of_rows: int,
        weight: Tensor | None = None,
        fitted_on: FittedOn = "validation rows",
    ) -> Self:
        """Fit to rows.

        Args:
            probability: (N,) floating, uncalibrated, of the positive class.
            target: (N,) int64, 1 for the positive class.
            of_rows: The number of all rows.
            weight: (N,) floating, positive, the weight of each row; equal weights if None.
            fitted_on: What the rows are.

        Raises:
            ValueError: A probability is not a number.
        """
        temperature = fit_temperature(probability, target, weight)
        threshold = fit_threshold(calibrated(probability, temperature), target, weight)
        return cls(temperature, threshold, len(target), of_rows, fitted_on)


def calibrated(probability: Tensor, temperature: float | Tensor) -> Tensor:
    """The probability with its log-odds divided by the temperature (Guo et al. 2017, arXiv 1706.04599, section 4.2).

    Args:
        probability: Any shape, floating, in [0, 1].
        temperature: Positive.

    Returns:
        float64 of the same shape.
    """
    return torch.sigmoid(torch.logit(probability.double(), eps=1e-12) / temperature)


def metrics_by_reading(
    rows: Mapping[str, Tensor],
    metrics: Callable[[Tensor, float], dict[str, Tensor]],
    calibration: Calibration | None,
) -> dict[str, dict[str, Tensor]]:
    """The metrics of a test in up to three variants, which metrics.json calls readings.

    - `raw`: the uncalibrated probability, with the threshold `DECISION`.
    - `calibrated`: the calibrated probability, with the threshold `DECISION`.
    - `f1_optimal`: the calibrated probability, with the calibration's `f1_threshold`.

    Args:
        rows: Columns (N,); `probability` and `calibrated` are used.
        metrics: Computes the metrics from probabilities (N,) and a threshold.
        calibration: If None, there is only `raw`.
    """
    readings = {"raw": metrics(rows["probability"], DECISION)}
    if calibration is not None:
        readings["calibrated"] = metrics(rows["calibrated"], DECISION)
        readings["f1_optimal"] = metrics(rows["calibrated"], calibration.f1_threshold)
    return readings


def fit_temperature(probability: Tensor, target: Tensor, weight: Tensor | None = None) -> float:
    """The temperature in `TEMPERATURE_RANGE` that maximizes the likelihood of the targets.

    Args:
        probability: (N,) floating, uncalibrated P(accepted).
        target: (N,) int64, 1 for accepted.
        weight: (N,) floating, positive, the weight of each row; equal weights if None.

    Raises:
        ValueError: A probability is not a number.
    """
    _refuse_nan(probability)
    # Lightning validates in inference mode, whose tensors record no gradients. So they are copied outside it.
    with torch.inference_mode(False), torch.enable_grad():
        log_odds_N, target_N = torch.logit(probability.double().clone(), eps=1e-12), target.clone().double()
        weight_N = None if weight is None else weight.clone().double()
        low, high = (torch.log(torch.tensor(bound, dtype=torch.float64)) for bound in TEMPERATURE_RANGE)
        log_temperature = torch.zeros((), dtype=torch.float64, device=log_odds_N.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            scaled_N = log_odds_N / torch.exp(log_temperature)
            value = torch.nn.functional.binary_cross_entropy_with_logits(scaled_N, target_N, weight_N)
            value.backward()
            return value

        optimizer.step(loss)
        return float(torch.exp(log_temperature.detach().cpu().clamp(low, high)))


def fit_threshold(probability: Tensor, target: Tensor, weight: Tensor | None = None) -> float:
    """The threshold with the greatest F1, halfway to the next lower probability, so that it generalizes.

    Args:
        probability: (N,) floating, P(accepted) as it is compared with the threshold.
        target: (N,) int64, 1 for accepted.
        weight: (N,) floating, positive, the weight of each row; equal weights if None.

    Returns:
        A threshold in [0, 1]; 0.5 if no row was accepted.

    Raises:
        ValueError: A probability is not a number.
    """
    from sklearn.metrics import precision_recall_curve  # takes a second to import

    _refuse_nan(probability)
    if not target.any():
        return 0.5
    columns = (None if column is None else column.cpu().numpy() for column in (target, probability, weight))
    target_N, probability_N, weight_N = columns
    precision_T, recall_T, threshold_T = precision_recall_curve(target_N, probability_N, sample_weight=weight_N)
    f1_T = 2 * precision_T * recall_T / (precision_T + recall_T).clip(min=1e-12)
    best = probability.new_tensor(threshold_T[f1_T[:-1].argmax()])
    lower = probability[probability < best]
    if not len(lower):
        return float(best) / 2
    middle = (best + lower.max()) / 2
    return float(middle if middle < best else lower.max())  # rounding can make the middle equal to `best`


def _refuse_nan(probability: Tensor) -> None:
    if probability.isnan().any():
        raise ValueError("a probability is not a number")
