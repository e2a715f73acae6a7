"""report.html: one self-contained page on how a model was trained and where it errs."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.corpus.records import AnnotatedRow, Category
from models.learning.calibration import DECISION
from models.reporting.plots import image, loss_plot, new_axes, precision_recall_plot, reliability_plot
from models.reporting.templates_folder import TEMPLATES

WORST_MISTAKES = 12
EVENTS_SHOWN = 6


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Logged metrics by name and step; where files overlap, as after a resume, the later one counts."""
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(sorted(folder.glob("metrics*.csv")), key=lambda file: file.stat().st_mtime):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                if not (line.get("step") or "").isdecimal():
                    continue  # a kill cut it short while it was written
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
    """The page as HTML; text from data stands in it escaped.

    Args:
        record: As `run_record` gives it.
        rows: The classifier's `test_rows`: probability, calibrated (N,) float64; target, category, row (N,) int64.
        test: The test rows that `row` counts.
        curves: As `read_curves` gives them.
    """
    return _page(
        "reward_report.html",
        record=record,
        plots={
            "Loss": loss_plot(curves),
            "Precision and recall": precision_recall_plot(rows, record),
            "Reliability": reliability_plot(rows),
            "Decisions by category": _category_plot(rows),
        },
        mistakes=_mistakes(rows, test),
        categories=[category.value for category in Category],
    )


def agent_report(
    record: dict[str, Any],
    rows: dict[str, Tensor],
    samples: Sequence[dict[str, str]],
    curves: dict[str, dict[int, float]],
) -> str:
    """The page as HTML; text from data and model stands in it escaped.

    Args:
        record: As `run_record` gives it.
        rows: The agent's `test_rows`: probability, calibrated (N,) float64; target (N,) int64.
        samples: As `read_samples` gives them.
        curves: As `read_curves` gives them.
    """
    return _page(
        "agent_report.html",
        record=record,
        plots={
            "Loss": loss_plot(curves),
            "Precision and recall": precision_recall_plot(rows, record),
            "Reliability": reliability_plot(rows),
        },
        samples=samples,
    )


def _page(template: str, **content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True)
    return environment.get_template(template).render(**content)


def _mistakes(rows: dict[str, Tensor], test: Sequence[AnnotatedRow]) -> list[dict[str, Any]]:
    """The wrong decisions that the classifier was surest of."""
    decided = rows["calibrated"] > DECISION
    wrong = (decided != rows["target"].bool()).nonzero().flatten()
    surest = wrong[(rows["calibrated"][wrong] - rows["target"][wrong]).abs().argsort(descending=True)]
    return [
        {
            "probability": float(rows["calibrated"][place]),
            "row": row,
            "earlier": max(len(row.history) - EVENTS_SHOWN, 0),
            "events": row.history[-EVENTS_SHOWN:],
        }
        for place in surest[:WORST_MISTAKES].tolist()
        for row in [test[int(rows["row"][place])]]
    ]


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
