"""report.html: one page that needs nothing else, shows text as text, and is made of any result."""

import base64
import os
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from datamodules.corpus.records import AnnotatedRow, Category
from models.learning.metrics import reward_metrics
from models.reporting.run_page import WORST_MISTAKES, read_curves, reward_report
from models.reporting.run_record import run_record
from tests.models.reporting.conftest import Run

HOSTILE = '<script>alert("1")</script> <img src=https://example.com/x onerror=alert(2)> </ol>'
PLOTS = ["Loss", "Precision and recall", "Reliability", "Decisions by category"]


class Page(HTMLParser):
    """Every tag, every attribute that loads something, and all text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def a_row(number: int, category: Category, text: str = "opens a file") -> AnnotatedRow:
    accepted = category in (Category.NON_RESPONSE, Category.CORRECT_DETECTION)
    proposal = None if category in (Category.NON_RESPONSE, Category.MISSED_NEED) else f"proposal {number}: {text}"
    events = [
        {"time": str(1_700_000_000 + step), "event": f"event {step} of row {number}: {text}"} for step in range(9)
    ]
    return AnnotatedRow.model_validate({"obs": events, "pred_task": proposal, "valid": accepted})


def made_of(probability: list[float], rows: list[AnnotatedRow], run: Run, **changes: Any) -> str:
    """The page for rows with these probabilities, in an order other than that of the split."""
    order = torch.arange(len(rows)).flip(0)
    columns: dict[str, Tensor] = {
        "probability": torch.tensor(probability, dtype=torch.float64)[order],
        "calibrated": torch.tensor(probability, dtype=torch.float64)[order],
        "target": torch.tensor([int(row.accepted) for row in rows])[order],
        "category": torch.tensor([row.category.number for row in rows])[order],
        "row": order,
    }
    figures = reward_metrics(
        columns["probability"], columns["target"], columns["category"], scene_N=torch.arange(len(rows))
    )
    record = deepcopy(run_record(run.classifier, run.data, "weights"))
    plain = {name: float(value) for name, value in figures.items()}
    record["test"] = {"raw": plain, "calibrated": plain, "f1_optimal": plain}
    curves = changes.pop("curves", {"train/loss": {1: 0.7, 2: 0.6}, "validation/loss": {2: 0.65}})
    return reward_report(record | changes, columns, rows, curves)


def test_the_report_is_self_contained(run: Run) -> None:
    text = (run.folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loaded, "the plots"
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loaded)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_report_shows_metrics_plots_and_contamination(run: Run) -> None:
    text = (run.folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    record = run_record(run.classifier, run.data, "weights")
    for reading in ("raw", "calibrated"):
        for name in ("accuracy", "precision", "recall", "f1", "auroc", "calibration_error"):
            assert f"{record['test'][reading][name]:.4f}" in page.text
    for title in (*PLOTS, "Worst mistakes"):
        assert title in page.text
    images = [base64.b64decode(address.partition(",")[2], validate=True) for address in page.loaded]
    assert len(images) == len(PLOTS) == len(set(images))
    for image in images:
        drawing = ElementTree.fromstring(image)
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
        assert not list(drawing.iter("{http://www.w3.org/2000/svg}image")), "no bitmap within"
        assert b"prefers-color-scheme:dark" in image
        assert b"#010203" not in image
    assert f"{run.data.contamination.contaminated_rows} of {run.data.contamination.test_rows} test rows" in page.text
    assert run.data.description in page.text


def test_text_from_data_and_options_is_escaped(run: Run) -> None:
    rows = [a_row(0, Category.FALSE_ALARM, HOSTILE), a_row(1, Category.MISSED_NEED, HOSTILE)]
    page = Page(made_of([0.9, 0.8], rows, run, split=HOSTILE, backbone=HOSTILE, weights=HOSTILE))
    clean = Page(made_of([0.9, 0.8], [a_row(0, Category.FALSE_ALARM), a_row(1, Category.MISSED_NEED)], run))
    assert page.tags == clean.tags
    assert not page.handlers
    assert all(address.startswith("data:") for address in page.loaded)
    assert page.text.count(HOSTILE) >= 6 + 6 + 1 + 3  # shown events of two rows, one proposal, three options


def test_the_worst_mistakes_come_first_and_correct_decisions_are_not_listed(run: Run) -> None:
    kinds = [Category.FALSE_ALARM, Category.CORRECT_DETECTION]
    rows = [a_row(number, kinds[number % 2]) for number in range(40)]
    # Rows 0 to 29 are wrong, ever more surely so; the others are right.
    margins = [0.01 * (number + 1) for number in range(30)] + [-0.3] * 10
    probability = [
        0.5 + margin if not row.accepted else 0.5 - margin for row, margin in zip(rows, margins, strict=True)
    ]
    text = Page(made_of(probability, rows, run)).text
    shown = [int(number) for number in re.findall(r"Proposal: proposal (\d+):", text)]
    assert shown == list(range(29, 29 - WORST_MISTAKES, -1))
    stated = [float(number) for number in re.findall(r"P\(accepted\) (\d\.\d+), people", text)]
    assert stated == pytest.approx([probability[number] for number in shown], abs=5e-4)
    assert "3 earlier events" in text
    assert "event 8 of row 29" in text
    assert "event 2 of row 29" not in text


def test_a_null_proposal_and_the_text_null_look_different(run: Run) -> None:
    assert "Proposal: none" in Page(made_of([0.9, 0.1], [a_row(0, c) for c in (Category.MISSED_NEED,) * 2], run)).text


@pytest.mark.parametrize(
    ("probability", "categories"),
    [
        ([0.1, 0.9], [Category.FALSE_ALARM, Category.CORRECT_DETECTION]),
        ([0.2, 0.9], [Category.FALSE_ALARM, Category.FALSE_ALARM]),
        ([0.2, 0.9], [Category.NON_RESPONSE, Category.CORRECT_DETECTION]),
        ([0.0, 1.0], [Category.MISSED_NEED, Category.NON_RESPONSE]),
        ([0.5], [Category.MISSED_NEED]),
    ],
    ids=["no mistake", "none accepted", "all accepted", "certain", "one row"],
)
@pytest.mark.parametrize("curves", [{}, {"validation/loss": {3: 0.5}}], ids=["no curves", "no training loss"])
def test_every_possible_result_gives_a_report(
    run: Run, probability: list[float], categories: list[Category], curves: dict[str, dict[int, float]]
) -> None:
    rows = [a_row(number, category) for number, category in enumerate(categories)]
    page = Page(made_of(probability, rows, run, curves=curves))
    assert len(page.loaded) == len(PLOTS)
    mistakes = sum((p > 0.5) != row.accepted for p, row in zip(probability, rows, strict=True))
    assert page.text.count(", people ") == mistakes
    assert ("every decision on the test rows was correct" in page.text) == (mistakes == 0)


def test_curves_of_a_resumed_run_continue_the_earlier_ones(tmp_path: Path) -> None:
    """Steps done twice count as the resumed run did them; files count by age and not by name."""
    earlier, later = tmp_path / "metrics.csv", tmp_path / "metrics-0.csv"
    earlier.write_text("epoch,step,train/loss,validation/loss\n0,1,0.9,\n0,2,0.8,\n0,2,,0.85\n0,3,0.1,\n")
    later.write_text("epoch,step,train/loss,other\n0,3,0.7,\n0,4,0.6,1\n")
    os.utime(earlier, (1e9, 1e9))
    os.utime(later, (2e9, 2e9))
    curves = read_curves(tmp_path)
    assert curves["train/loss"] == {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.6}
    assert list(curves["train/loss"]) == [1, 2, 3, 4]
    assert curves["validation/loss"] == {2: 0.85}
    assert curves["other"] == {4: 1.0}
    assert read_curves(tmp_path / "nothing") == {}


@pytest.mark.parametrize("last", ["0,0.6", "0,0.6,", "0", "\0\0\0\0", "0,0.6,\0\0"])
def test_a_truncated_line_of_the_log_does_not_break_the_report(tmp_path: Path, last: str) -> None:
    """SIGKILL may hit while the logger writes; Lightning sorts its columns, so the step need not come first."""
    path = tmp_path / "metrics.csv"
    path.write_text(f"epoch,train/loss,step\n0,0.9,1\n0,0.8,2\n{last}")
    assert read_curves(tmp_path) == {"train/loss": {1: 0.9, 2: 0.8}}


def test_the_reports_curves_are_those_that_were_logged(run: Run) -> None:
    curves = read_curves(run.folder / "logs")
    assert len(curves["train/loss"]) == 12
    assert len(curves["validation/loss"]) == 2
