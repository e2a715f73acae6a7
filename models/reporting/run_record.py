"""The result of a run as one mapping: the content of metrics.json, of the model card and of the report."""

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from datamodules.batching.rows import RowsDataModule
from datamodules.corpus.records import Category
from datamodules.corpus.sources import rows_digest
from models.learning.calibration import DECISION, fit_threshold
from models.learning.metrics import FEW_GROUPS
from models.learning.published_metrics import PUBLISHED_REWARD_ROWS
from models.learning.sharded_files import content_digest
from models.learning.training import BackboneModule
from models.reporting.decided_rows import scored_by_words

RECORDED_PACKAGES = (
    "proactive",
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "datasets",
    "tokenizers",
)


def run_record(model: BackboneModule, data: RowsDataModule, source: str) -> dict[str, Any]:
    """The metrics of a tested model, with everything needed to read them.

    Args:
        model: The tested model.
        data: The data of the test.
        source: Path of the tested weights.
    """
    contamination = data.contamination
    rows = data.row_counts
    partial = model.test_count < rows["test"]
    published = data.tests_published_rows and not partial
    record = {
        "task": model.task,
        "weights": source,
        "backbone": model.hparams["backbone"],
        "split": data.description,
        "data": {
            "read": list(data.notes),
            "digests": {name: rows_digest(getattr(data.split, name)) for name in rows},
        },
        "rows": rows,
        "tested_rows": model.test_count,
        "truncated_rows": dict(data.truncated),
        "contamination": {
            "test_rows": contamination.test_rows,
            "contaminated_rows": contamination.contaminated_rows,
            "fraction": contamination.fraction,
            "validated_rows": contamination.validated_rows,
            "allowed": data.contamination_allowed,
        },
        "calibration": None if model.calibration is None else asdict(model.calibration),
        "readings": _readings(model),
        "test": model.test_metrics,
        "before": model.before_metrics,
        "baselines": _baselines(model, data),
        "published": PUBLISHED_REWARD_ROWS if published else {},
        "versions": versions(),
    }
    return record | {"notes": notes(record)}


def notes(record: Mapping[str, Any]) -> list[str]:
    """What a reader has to know about the metrics of a test, a sentence each. Warnings start with capitals."""
    return [
        *_contamination_notes(record),
        *_one_sided_notes(record),
        *_scope_notes(record),
        f"raw and calibrated decide above {DECISION:g}",
        _calibration_note(record["calibration"]),
    ]


def _contamination_notes(record: Mapping[str, Any]) -> Iterator[str]:
    """What the test has in common with training and validation, and whether it covers all test rows."""
    found = record["contamination"]
    of_rows = f"of {found['test_rows']} test rows have a history that"
    if found["allowed"]:
        yield "CONTAMINATED: trained on scenes of the test"
    warning = "CONTAMINATED: " if found["contaminated_rows"] else ""
    yield f"{warning}{found['contaminated_rows']} {of_rows} was trained on"
    if found["validated_rows"] is None:
        yield "VALIDATION UNKNOWN: the checkpoint does not say which rows chose its best weights and calibrated it"
    elif found["validated_rows"]:
        yield f"VALIDATED ON: {found['validated_rows']} {of_rows} chose the best weights and calibrated them"
    tested, rows = record["tested_rows"], record["rows"]["test"]
    if tested < rows:
        yield f"PARTIAL: metrics of {tested} of the {rows} test rows (trainer.limit_test_batches)"


def _one_sided_notes(record: Mapping[str, Any]) -> Iterator[str]:
    """Whether the model decides all silences, or all offers, alike where people differ."""
    metrics = record["test"].get("calibrated", record["test"]["raw"])
    for what, rejected, accepted in (
        ("silence", Category.MISSED_NEED, Category.NON_RESPONSE),
        ("proposal", Category.FALSE_ALARM, Category.CORRECT_DETECTION),
    ):
        rejected_rows, accepted_rows = metrics.get(f"rows_{rejected}"), metrics.get(f"rows_{accepted}")
        if not rejected_rows or not accepted_rows:  # an agent's test has no categories
            continue
        share = rejected_rows / (rejected_rows + accepted_rows)
        agreement = metrics[f"agreement_{rejected}"], metrics[f"agreement_{accepted}"]
        if agreement == (0, 1):
            yield f"EVERY {what.upper()} IS ACCEPTED: people reject {share:.0%} of them"
        if agreement == (1, 0):
            yield f"EVERY {what.upper()} IS REJECTED: people accept {1 - share:.0%} of them"


def _scope_notes(record: Mapping[str, Any]) -> Iterator[str]:
    """Whether there are intervals and baselines."""
    raw = record["test"]["raw"]
    if "accuracy_low" in raw:
        yield intervals_note(int(raw["scenes"]), "scenes")
    else:
        yield "no intervals: all rows are of one scene"
    if not record["baselines"]:
        yield "no baselines: the training rows of the model are not available"


def _calibration_note(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "NOT CALIBRATED: no validation ran after a training step, so probabilities are the network's own"
    if calibration["rows"] is None:
        return "calibrated on validation rows; the checkpoint does not say on how many"
    warning = "PARTLY CALIBRATED: " if calibration["rows"] < calibration["of_rows"] else "calibrated "
    return f"{warning}on {calibration['rows']} of {calibration['of_rows']} {calibration['fitted_on']}"


def intervals_note(groups: int, what: str) -> str:
    """A sentence about the intervals: how many groups they resample, and whether these are too few."""
    few = f", too few to rely on (less than {FEW_GROUPS})" if groups < FEW_GROUPS else ""
    return f"in brackets: 95% bootstrap intervals over {groups} {what}{few}"


def _baselines(model: BackboneModule, data: RowsDataModule) -> dict[str, dict[str, float]]:
    """Metrics of baselines on the tested rows, by name; empty without training rows to fit them on."""
    scores, rows = data.word_scores, model.test_rows
    if scores is None:
        return {}
    words_N, _ = scored_by_words(data, rows["row"])
    assert words_N is not None
    threshold = fit_threshold(scores.validation, scores.validation_target) if len(scores.validation) else DECISION
    always, never = model.constant_decisions
    judges = {
        f"majority of training rows: {always if scores.majority else never}": (
            torch.full_like(words_N, scores.majority),
            DECISION,
        ),
        always: (torch.ones_like(words_N), DECISION),
        "bag of words": (words_N, DECISION),
        f"bag of words, greatest F1, above {threshold:.4f}": (words_N, threshold),
    }
    found = {}
    for name, (score_N, above) in judges.items():
        metrics = model.decision_metrics(score_N, rows, above)
        found[name] = {metric: float(value) for metric, value in metrics.items()}
    return found


def _readings(model: BackboneModule) -> dict[str, str]:
    """The variants of the test's metrics, by key, with their labels. Without a threshold they decide at `DECISION`."""
    labels = {"raw": "raw", "calibrated": "calibrated"}
    if model.calibration is not None:
        labels["f1_optimal"] = f"greatest F1, above {model.calibration.f1_threshold:.4f}"
    return {name: labels[name] for name in model.test_metrics}


def tested_record(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The record of the test that `trainer` has just run, with the digest of the tested checkpoint, if there is one."""
    assert isinstance(pl_module, BackboneModule)
    data = trainer.datamodule  # type: ignore[attr-defined]
    path = trainer.ckpt_path
    digest = content_digest(Path(path)) if path else None
    return run_record(pl_module, data, str(path or "in memory")) | {"weights_digest": digest}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that metrics depend on."""
    packages = {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES}
    return {"python": platform.python_version(), **packages}
