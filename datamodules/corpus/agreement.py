"""Agreement of annotators, from sums per trace, so that whole traces can be resampled."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000


def agreement(
    units: Iterable[tuple[str, Sequence[Hashable]]], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Compute agreement on nominal labels, with 95% bootstrap intervals over traces.

    Args:
        units: The trace and the labels of each unit, from any number of annotators. Units with fewer than two labels
            are skipped.
        resamples: Number of bootstrap resamples. There are no intervals if it is 0, or for a single trace.
        seed: Seed of the resamples.

    Returns:
        `units` and `traces`: their numbers. `raw`: the share of equal pairs of labels within a unit, mean over units.
        `alpha`: Krippendorff's alpha, 1 - observed / expected disagreement over pairs of labels, after his Computing
        Krippendorff's Alpha-Reliability (2011), section D: 1 is full agreement, 0 is chance, and negative values are
        systematic disagreement. `kappa`: Fleiss' kappa, (raw - chance) / (1 - chance), if all units have equally many
        labels. `raw_low`, `raw_high` and so on: the intervals. A value is None if it is undefined.
    """
    # Count each distinct pattern of labels once, because there are few.
    patterns = Counter((trace, tuple(labels)) for trace, labels in units if len(labels) > 1)
    traces = {trace: place for place, trace in enumerate(dict.fromkeys(trace for trace, _ in patterns))}
    values = {value: place for place, value in enumerate(dict.fromkeys(v for _, labels in patterns for v in labels))}
    # Per trace: units, share of equal pairs, unequal pairs divided by the number of partners, then label counts.
    sums_TF = np.zeros((len(traces), 3 + len(values)))
    for (trace, labels), times in patterns.items():
        counts, count = Counter(labels), len(labels)
        squares = sum(number**2 for number in counts.values())
        same, unlike = (squares - count) / (count * (count - 1)), (count**2 - squares) / (count - 1)
        sums_TF[traces[trace], :3] += np.multiply(times, (1, same, unlike))
        for value, number in counts.items():
            sums_TF[traces[trace], 3 + values[value]] += times * number
    complete = len({len(labels) for _, labels in patterns}) == 1
    found: dict[str, Any] = {"units": patterns.total(), "traces": len(traces)}
    for name, value_1 in _statistics(sums_TF.sum(0, keepdims=True), complete).items():
        found[name] = None if np.isnan(value_1[0]) else float(value_1[0])
    if resamples and len(traces) > 1:
        drawn_RT = np.random.default_rng(seed).multinomial(len(traces), [1 / len(traces)] * len(traces), resamples)
        for name, drawn_R in _statistics(drawn_RT @ sums_TF, complete).items():
            if found[name] is not None and (sound := drawn_R[~np.isnan(drawn_R)]).size:
                found[f"{name}_low"], found[f"{name}_high"] = map(float, np.percentile(sound, (2.5, 97.5)))
    return found


def interval(found: dict[str, Any], name: str) -> str:
    """Format a value with its interval; empty if it is undefined."""
    if found.get(name) is None:
        return ""
    low, high = found.get(f"{name}_low"), found.get(f"{name}_high")
    return f"{found[name]:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def _statistics(sums_RF: np.ndarray, complete: bool) -> dict[str, np.ndarray]:
    """Compute each statistic (R,) from sums over traces (R, 3 + values); NaN if it is undefined."""
    units_R, same_R, unlike_R = sums_RF[:, :3].T
    labels_R, squares_R = sums_RF[:, 3:].sum(1), (sums_RF[:, 3:] ** 2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        varied_R = np.where(labels_R**2 > squares_R, 1.0, np.nan)  # undefined if all labels are equal
        raw_R, chance_R = same_R / units_R, squares_R / labels_R**2
        alpha_R = 1 - (labels_R - 1) * unlike_R / (labels_R**2 - squares_R)
        kappa_R = (raw_R - chance_R) / (1 - chance_R) if complete else np.full_like(raw_R, np.nan)
    return {"raw": raw_R, "alpha": alpha_R * varied_R, "kappa": kappa_R * varied_R}
