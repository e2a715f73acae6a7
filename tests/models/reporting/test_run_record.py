"""metrics.json: everything needed to read a run's metrics, in strict JSON."""

import importlib.metadata
import json
import platform
from dataclasses import asdict
from typing import Any

import pytest

from callbacks.metrics_file import MetricsFile
from callbacks.run_facts import RunFacts
from datamodules.batching.bag_of_words import bag_of_words, marked_words
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.corpus.records import Category
from datamodules.corpus.sources import load_corpus
from models.learning.reward_classifier import RewardClassifier
from models.learning.saved_models import model_from_export
from models.reporting.run_record import RECORDED_PACKAGES, notes, run_record
from proactive.tasks import TASKS
from tests.helpers import PROACTIVEBENCH, needs_proactivebench
from tests.models.reporting.conftest import Run
from tests.models.small import small_trainer


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture(scope="module")
def record(run: Run) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.folder / "metrics.json").read_text(), parse_constant=refuse)
    return content


def test_the_record_names_model_data_and_split(record: dict[str, Any], run: Run) -> None:
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
    assert run.classifier.calibration is not None
    assert record["calibration"] == asdict(run.classifier.calibration)
    assert set(record["truncated_rows"]) == {"train", "validation", "test"}


def test_the_record_counts_the_contaminated_test_rows(record: dict[str, Any], run: Run) -> None:
    known = {row.history for row in run.data.split.train}
    contaminated = sum(row.history in known for row in run.data.split.test)
    test_rows = len(run.data.split.test)
    assert record["contamination"] == {
        "test_rows": test_rows,
        "contaminated_rows": contaminated,
        "fraction": contaminated / test_rows,
        "validated_rows": 0,
        "allowed": False,
    }


def test_the_record_has_raw_and_calibrated_metrics_with_intervals_and_the_published_ones(
    record: dict[str, Any], run: Run
) -> None:
    assert record["test"] == run.classifier.test_metrics
    for reading in ("raw", "calibrated", "f1_optimal"):
        figures = record["test"][reading]
        assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
        assert figures["tp"] + figures["fp"] + figures["tn"] + figures["fn"] == len(run.data.split.test)
        assert figures["scenes"] == len({row.scene for row in run.data.split.test})
    assert record["published"] == {}, "other rows than the published ones"
    assert (record["tested_rows"], record["rows"]["test"]) == (len(run.data.split.test),) * 2
    assert any("bootstrap intervals over 3 scenes, too few to rely on" in note for note in record["notes"])


def test_the_record_has_baselines_fitted_on_the_training_rows(record: dict[str, Any], run: Run) -> None:
    split, baselines = run.data.split, record["baselines"]
    accepted = sum(row.accepted for row in split.test) / len(split.test)
    assert baselines["accept everything"]["accuracy"] == pytest.approx(accepted)
    mostly = sum(row.accepted for row in split.train) * 2 > len(split.train)
    majority = baselines[f"majority of training rows: {'accept' if mostly else 'reject'} everything"]
    assert majority["accuracy"] == pytest.approx(accepted if mostly else 1 - accepted)
    texts = [marked_words(row.history, row.proposal) for row in split.train]
    score = bag_of_words(texts, [row.accepted for row in split.train])
    said = score([marked_words(row.history, row.proposal) for row in split.test]) > 0.5
    right = sum(bool(one) is row.accepted for one, row in zip(said, split.test, strict=True))
    assert baselines["bag of words"]["accuracy"] == pytest.approx(right / len(split.test))
    assert {figures["rows"] for figures in baselines.values()} == {len(split.test)}


def test_a_partial_test_is_marked_everywhere(run: Run, tmp_path: Any) -> None:
    from callbacks.export_model import ExportModel
    from callbacks.html_report import HtmlReport

    facts, page = RunFacts(tmp_path), TASKS["reward"].page
    callbacks = (MetricsFile(tmp_path, facts), HtmlReport(tmp_path, page, facts), ExportModel(tmp_path))
    model = model_from_export(RewardClassifier, run.folder / "export")[0]
    small_trainer(*callbacks, limit_test_batches=1).test(model, run.data, verbose=False)
    record = json.loads((tmp_path / "metrics.json").read_text())
    used, rows = record["tested_rows"], len(run.data.split.test)
    assert 0 < used < rows
    assert {figures["rows"] for figures in [*record["test"].values(), *record["baselines"].values()]} == {used}
    assert any(note.startswith(f"PARTIAL: metrics of {used} of the {rows} test rows") for note in record["notes"])
    for file in ("report.html", "export/README.md"):
        text = (tmp_path / file).read_text()
        assert f"{used} of {rows} test rows" in text
        assert "PARTIAL: metrics" in text


@pytest.mark.parametrize(
    ("agreement", "flag"),
    [
        ((0, 1, 0.5, 0.5), "EVERY SILENCE IS ACCEPTED: people reject 25% of them"),
        ((1, 0, 0.5, 0.5), "EVERY SILENCE IS REJECTED: people accept 75% of them"),
        ((0.5, 1, 1, 0), "EVERY PROPOSAL IS ACCEPTED: people reject 60% of them"),
        ((0.5, 1, 0, 1), "EVERY PROPOSAL IS REJECTED: people accept 40% of them"),
        ((0.5, 1, 0.5, 0.5), None),
    ],
)
def test_constant_decisions_are_flagged(record: dict[str, Any], agreement: tuple[float, ...], flag: str | None) -> None:
    """Agreement with missed needs, right silences, accepted and rejected proposals."""
    figures = {f"agreement_{category}": share for category, share in zip(Category, agreement, strict=True)}
    figures |= {f"rows_{category}": count for category, count in zip(Category, (1, 3, 2, 3), strict=True)}
    test = {name: found | figures for name, found in record["test"].items()}
    found = [note for note in notes(record | {"test": test}) if note.startswith("EVERY")]
    assert found == ([flag] if flag else [])
    none_wrong = {name: found | {"rows_missed_need": 0, "rows_correct_detection": 0} for name, found in test.items()}
    assert not [note for note in notes(record | {"test": none_wrong}) if note.startswith("EVERY")], (
        "nothing to tell apart"
    )


@needs_proactivebench
def test_published_metrics_appear_only_with_the_published_rows(tmp_path: Any) -> None:
    for split, expected in (("published", True), ("by_scene", False)):
        data = RewardDataModule(root=str(PROACTIVEBENCH), split=split)  # type: ignore[arg-type]
        data._split = data.divide(load_corpus(str(PROACTIVEBENCH)))
        assert data.tests_published_rows is expected
    data = RewardDataModule(root="embedded", split="published")
    data._split = data.divide(load_corpus("embedded"))
    assert not data.tests_published_rows


def test_the_record_names_versions(record: dict[str, Any]) -> None:
    assert record["versions"]["python"] == platform.python_version()
    for name in RECORDED_PACKAGES:
        assert record["versions"][name] == importlib.metadata.version(name)


def test_the_record_names_the_tested_weights(run: Run, record: dict[str, Any]) -> None:
    assert record["weights"], "of the run itself"
    assert run_record(run.classifier, run.data, "some/best.ckpt")["weights"] == "some/best.ckpt"


def test_a_second_test_replaces_the_file(run: Run, tmp_path: Any) -> None:
    (tmp_path / "metrics.json").write_text("former")
    small_trainer(MetricsFile(tmp_path, RunFacts(tmp_path))).test(run.classifier, run.data, verbose=False)
    assert json.loads((tmp_path / "metrics.json").read_text())["test"] == run.classifier.test_metrics
