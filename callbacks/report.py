"""report.html: one self-contained page on how a reward classifier was trained and where it errs."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.export import TEMPLATES
from callbacks.files import LOGS, REPORT_FILE, write_atomically
from callbacks.plots import image, new_axes
from callbacks.record import tested_record
from datamodules.records import AnnotatedRow, Category
from models.reward import RewardClassifier

WORST_MISTAKES = 12
EVENTS_SHOWN = 6
CALIBRATION_BINS = 10


class HtmlReport(Callback):
    """Writes report.html when the test has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, RewardClassifier)
        data = trainer.datamodule  # type: ignore[attr-defined]
        page = report(
            tested_record(trainer, pl_module),
            pl_module.test_rows,
            data.split.test,
            read_curves(sorted((self.folder / LOGS).glob("metrics*.csv"))),
        )
        write_atomically(self.folder / REPORT_FILE, page)


def read_curves(files: Sequence[Path]) -> dict[str, dict[int, float]]:
    """Logged figures by name and step; where files overlap, as after a resume, the later one counts."""
    curves: dict[str, dict[int, float]] = {}
    for path in sorted(files, key=lambda file: file.stat().st_mtime):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                if not (line.get("step") or "").isdecimal():
                    continue  # a kill cut it short while it was written
                for name, value in line.items():
                    if name not in ("step", "epoch") and value:
                        curves.setdefault(name, {})[int(line["step"])] = float(value)
    return {name: dict(sorted(points.items())) for name, points in curves.items()}


def report(
    record: dict[str, Any],
    rows: dict[str, Tensor],
    test: Sequence[AnnotatedRow],
    curves: dict[str, dict[int, float]],
) -> str:
    """The page as HTML; text from data stands in it escaped.

    Args:
        record: As `reward_record` gives it.
        rows: The classifier's `test_rows`: probability, calibrated (N,) float64; target, category, row (N,) int64.
        test: The test rows that `row` counts.
        curves: As `read_curves` gives them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=True)
    return environment.get_template("report.html").render(
        record=record,
        plots={
            "Loss": _loss_plot(curves),
            "Precision and recall": _precision_recall_plot(rows, record),
            "Reliability": _reliability_plot(rows),
            "Decisions by category": _category_plot(rows, record["threshold"]),
        },
        mistakes=_mistakes(rows, test, record["threshold"]),
        categories=[category.value for category in Category],
    )


def _mistakes(rows: dict[str, Tensor], test: Sequence[AnnotatedRow], threshold: float) -> list[dict[str, Any]]:
    """The wrong decisions that the classifier was surest of."""
    decided = rows["calibrated"] > threshold
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


def _loss_plot(curves: dict[str, dict[int, float]]) -> str:
    axes = new_axes("optimizer step", "cross-entropy")
    for name, style in (("train/loss", {"alpha": 0.7}), ("validation/loss", {"marker": "o"})):
        if points := curves.get(name):
            axes.plot(list(points), list(points.values()), label=name, **style)
    axes.set_ylim(bottom=0)
    return image(axes)


def _precision_recall_plot(rows: dict[str, Tensor], record: dict[str, Any]) -> str:
    from torchmetrics.functional.classification import binary_precision_recall_curve

    precision, recall, _ = binary_precision_recall_curve(rows["probability"], rows["target"])
    axes = new_axes("recall", "precision")
    axes.plot(recall, precision, drawstyle="steps-post", label="all thresholds")
    for name, marker in (("raw", "o"), ("calibrated", "s")):
        figures = record["test"][name]
        axes.plot(figures["recall"], figures["precision"], marker, label=f"{name}: F1 {figures['f1']:.3f}")
    accepted = float(rows["target"].double().mean())
    axes.axhline(accepted, color="grey", linestyle=":", label="all accepted")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return image(axes)


def _reliability_plot(rows: dict[str, Tensor]) -> str:
    axes = new_axes("P(accepted), mean of bin", "share accepted")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for column, label in (("probability", "raw"), ("calibrated", "calibrated")):
        bins = (rows[column] * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        filled = bins.unique().tolist()
        means = [float(rows[column][bins == number].mean()) for number in filled]
        shares = [float(rows["target"][bins == number].double().mean()) for number in filled]
        axes.plot(means, shares, marker="o", label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return image(axes)


def _category_plot(rows: dict[str, Tensor], threshold: float) -> str:
    decided = rows["calibrated"] > threshold
    axes = new_axes("test rows", "")
    names = [category.value.replace("_", " ") for category in Category]
    masks = [rows["category"] == category.number for category in Category]
    rejected = [int((mask & ~decided).sum()) for mask in masks]
    accepted = [int((mask & decided).sum()) for mask in masks]
    axes.barh(names, rejected, label="decided rejected", color="tab:orange")
    axes.barh(names, accepted, left=rejected, label="decided accepted", color="tab:green")
    axes.invert_yaxis()
    return image(axes)
