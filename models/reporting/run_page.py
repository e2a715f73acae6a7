"""report.html of a run: one self-contained page with metrics, plots and mistakes."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.corpus.records import AnnotatedRow, Category
from models.learning.calibration import DECISION
from models.reporting.plots import curves_plot, image, loss_plot, new_axes, precision_recall_plot, reliability_plot
from models.reporting.templating import template_environment

WORST_MISTAKES = 12
EVENTS_SHOWN = 6
# By title, the unit and the metrics of plots that agents have if they log one of the metrics.
AGENT_CURVES = {
    "Rewards of held-out pairs": (
        "beta x log-ratio",
        ("validation/reward_chosen", "validation/reward_rejected", "validation/reward_margin"),
    ),
    "Accuracy of held-out pairs": ("fraction", ("validation/preference_accuracy",)),
    "Rewards of answers": ("reward", ("train/reward", "validation/reward", "validation/held_out_reward")),
    "Offers and silence": ("fraction", ("train/offer_rate", "validation/offer_rate", "validation/p_null")),
    "Divergence from the reference": ("nats", ("train/divergence",)),
    "Length of answers": ("tokens", ("train/answer_tokens",)),
}


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Logged metrics by name and step. Where files of a resumed run overlap, the later one counts.

    Args:
        folder: The folder of metrics.csv.
    """
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(sorted(folder.glob("metrics*.csv")), key=lambda file: file.stat().st_mtime):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                if not (line.get("step") or "").isdecimal():
                    continue  # an incomplete row of a killed run
                for name, value in line.items():
                    if name not in ("step", "epoch") and value:
                        curves.setdefault(name, {})[int(line["step"])] = float(value)
    return {name: dict(sorted(points.items())) for name, points in curves.items()}


def reward_report(
    record: dict[str, Any],
    rows: dict[str, Tensor],
    test: Sequence[AnnotatedRow],
    curves: dict[str, dict[int, float]],
) -> str:
    """The page of a reward classifier as HTML. Text from data is escaped.

    Args:
        record: The `run_record` of the test.
        rows: The classifier's `test_rows`: probability, calibrated (N,) float64; target, category, row (N,) int64.
        test: The test rows that `row` indexes.
        curves: The result of `read_curves`.
    """
    plots = _plots(record, rows, curves) | {"Decisions by category": _category_plot(rows)}
    page = template_environment().get_template("reward_report.html")
    categories = [category.value for category in Category]
    return page.render(record=record, plots=plots, mistakes=_mistakes(rows, test), categories=categories)


def agent_report(
    record: dict[str, Any],
    rows: dict[str, Tensor],
    samples: Sequence[dict[str, str]],
    curves: dict[str, dict[int, float]],
) -> str:
    """The page of an agent as HTML. Text from data and model is escaped.

    Args:
        record: The `run_record` of the test.
        rows: The agent's `test_rows`: probability, calibrated (N,) float64; target (N,) int64.
        samples: The result of `read_samples`.
        curves: The result of `read_curves`.
    """
    page = template_environment().get_template("agent_report.html")
    plots = _plots(record, rows, curves)
    for title, (unit, names) in AGENT_CURVES.items():
        if any(name in curves for name in names):
            plots[title] = curves_plot(curves, unit, names)
    return page.render(record=record, plots=plots, samples=samples)


def _plots(record: dict[str, Any], rows: dict[str, Tensor], curves: dict[str, dict[int, float]]) -> dict[str, str]:
    """The plots of every task's page, by title."""
    return {
        "Loss": loss_plot(curves),
        "Precision and recall": precision_recall_plot(rows, record),
        "Reliability": reliability_plot(rows),
    }


def _mistakes(rows: dict[str, Tensor], test: Sequence[AnnotatedRow]) -> list[dict[str, Any]]:
    """The wrong decisions with the largest error in probability."""
    decided = rows["calibrated"] > DECISION
    wrong = (decided != rows["target"].bool()).nonzero().flatten()
    surest = wrong[(rows["calibrated"][wrong] - rows["target"][wrong]).abs().argsort(descending=True)]
    return [_mistake(rows, test, index) for index in surest[:WORST_MISTAKES].tolist()]


def _mistake(rows: dict[str, Tensor], test: Sequence[AnnotatedRow], index: int) -> dict[str, Any]:
    row = test[int(rows["row"][index])]
    return {
        "probability": float(rows["calibrated"][index]),
        "row": row,
        "earlier": max(len(row.history) - EVENTS_SHOWN, 0),
        "events": row.history[-EVENTS_SHOWN:],
    }


def _category_plot(rows: dict[str, Tensor]) -> str:
    decided = rows["calibrated"] > DECISION
    axes = new_axes("test rows", "")
    names = [category.value.replace("_", " ") for category in Category]
    masks = [rows["category"] == category.number for category in Category]
    rejected = [int((mask & ~decided).sum()) for mask in masks]
    accepted = [int((mask & decided).sum()) for mask in masks]
    axes.barh(names, rejected, label="decided rejected", color="tab:orange")
    axes.barh(names, accepted, left=rejected, label="decided accepted", color="tab:green")
    axes.invert_yaxis()
    return image(axes)
