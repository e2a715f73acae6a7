"""Plots of the reports: SVG that follows the reader's light or dark mode."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from models.learning.calibration import DECISION

CALIBRATION_BINS = 10
INK = "#010203"  # placeholder for the text color until the plot is written
MODES = "<style>svg{color:#1b1f24}@media(prefers-color-scheme:dark){svg{color:#e7eaee}}</style>"


def loss_plot(curves: dict[str, dict[int, float]]) -> str:
    """Training and validation loss by optimizer step; see `curves_plot`."""
    return curves_plot(curves, "loss", ("train/loss", "validation/loss"))


def curves_plot(curves: dict[str, dict[int, float]], y_label: str, names: Sequence[str]) -> str:
    """Some metrics by optimizer step.

    Args:
        curves: The result of `read_curves`.
        y_label: What the metrics have in common, or their unit.
        names: The metrics. Those that were not logged are left out.
    """
    axes = new_axes("optimizer step", y_label)
    for name in names:
        if points := curves.get(name):
            style: dict[str, Any] = {"alpha": 0.7} if name.startswith("train/") else {"marker": "o"}
            axes.plot(list(points), list(points.values()), label=name, **style)
    if all(value >= 0 for name in names for value in curves.get(name, {}).values()):
        axes.set_ylim(bottom=0)
    return image(axes)


def precision_recall_plot(rows: dict[str, Tensor], record: dict[str, Any]) -> str:
    """Precision and recall at all thresholds, and the decisions of a record.

    Args:
        rows: A model's `test_rows`: probability (N,) float64, target (N,) int64.
        record: The `run_record` of the test.
    """
    from torchmetrics.functional.classification import binary_precision_recall_curve

    precision, recall, _ = binary_precision_recall_curve(rows["probability"], rows["target"])
    axes = new_axes("recall", "precision")
    axes.plot(recall, precision, drawstyle="steps-post", label="all thresholds")
    for name, label, marker in (("raw", f"above {DECISION:g}", "o"), ("f1_optimal", "greatest F1 in validation", "s")):
        if metrics := record["test"].get(name):
            axes.plot(metrics["recall"], metrics["precision"], marker, label=f"{label}: F1 {metrics['f1']:.3f}")
    accepted = float(rows["target"].double().mean())
    axes.axhline(accepted, color="grey", linestyle=":", label="all")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return image(axes)


def reliability_plot(rows: dict[str, Tensor]) -> str:
    """The share of positive rows against their mean probability, over ten bins.

    Args:
        rows: A model's `test_rows`: probability, calibrated (N,) float64; target (N,) int64.
    """
    axes = new_axes("probability, mean of bin", "share of rows")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for column, label in (("probability", "raw"), ("calibrated", "calibrated")):
        bins = (rows[column] * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        filled = bins.unique().tolist()
        means = [float(rows[column][bins == number].mean()) for number in filled]
        shares = [float(rows["target"][bins == number].double().mean()) for number in filled]
        axes.plot(means, shares, marker="o", label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return image(axes)


def new_axes(x_label: str, y_label: str) -> Any:
    """Empty axes of a small plot."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    axes = Figure(figsize=(5, 3.6), layout="constrained", facecolor="none").add_subplot(facecolor="none")
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK)
    axes.spines[:].set_color(INK)
    axes.grid(alpha=0.3)
    return axes


def image(axes: Any) -> str:
    """The plot as a data URL of an SVG image."""
    import matplotlib

    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", labelcolor=INK, facecolor="none", edgecolor="#80808080")
    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "proactive"}):  # equal plots give equal text
        axes.figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    start, tag, rest = content.getvalue().partition("<defs>")
    text = f"{start}{MODES}{tag}{rest}".replace(INK, "currentColor")
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"
