"""metrics.json: all that is needed to read a run's figures, in strict JSON."""

import importlib.metadata
import json
import platform
from typing import Any

import pytest

from callbacks.record import RECORDED_PACKAGES, run_record
from models.metrics import PUBLISHED_REWARD_ROWS
from tests.callbacks.conftest import Run
from tests.models.small import small_trainer


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(scope="module")
def record(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.folder / "metrics.json").read_text(), parse_constant=refuse)
    return content


def test_it_says_what_was_tested_on_what(record: dict[str, Any], run: Run) -> None:
    split = run.data.split
    assert record["task"] == "reward"
    assert record["backbone"] == "scratch"
    assert record["split"] == run.data.description
    assert run.data.root in record["split"]
    assert record["rows"] == {
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
    }
    assert record["temperature"] == run.classifier.temperature
    assert record["threshold"] == run.classifier.threshold
    assert set(record["truncated_rows"]) == {"train", "validation", "test"}


def test_it_counts_the_contaminated_test_rows(record: dict[str, Any], run: Run) -> None:
    known = {row.history for row in run.data.split.train}
    contaminated = sum(row.history in known for row in run.data.split.test)
    test_rows = len(run.data.split.test)
    assert record["contamination"] == {
        "test_rows": test_rows,
        "contaminated_rows": contaminated,
        "fraction": contaminated / test_rows,
        "allowed": False,
    }


def test_it_holds_raw_and_calibrated_figures_with_intervals_beside_the_published_rows(
    record: dict[str, Any], run: Run
) -> None:
    assert record["test"] == run.classifier.test_figures
    for reading in ("raw", "calibrated"):
        figures = record["test"][reading]
        assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
        assert figures["tp"] + figures["fp"] + figures["tn"] + figures["fn"] == len(run.data.split.test)
    assert record["published"] == PUBLISHED_REWARD_ROWS


def test_it_names_the_versions_that_gave_the_figures(record: dict[str, Any]) -> None:
    assert record["versions"]["python"] == platform.python_version()
    for name in RECORDED_PACKAGES:
        assert record["versions"][name] == importlib.metadata.version(name)


def test_it_says_which_weights_were_tested(run: Run, record: dict[str, Any]) -> None:
    assert record["weights"], "of the run itself"
    assert run_record(run.classifier, run.data, "some/best.ckpt")["weights"] == "some/best.ckpt"


def test_a_second_test_writes_the_file_anew(run: Run, tmp_path: Any) -> None:
    from callbacks.record import MetricsFile

    (tmp_path / "metrics.json").write_text("former")
    small_trainer(MetricsFile(tmp_path)).test(run.classifier, run.data, verbose=False)
    assert json.loads((tmp_path / "metrics.json").read_text())["test"] == run.classifier.test_figures
