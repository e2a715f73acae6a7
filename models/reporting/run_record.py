"""What a run found out, as one plain mapping: the content of metrics.json, of the model card and of the report."""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from datamodules.batching.rows import RowsDataModule
from datamodules.corpus.records import Category
from models.learning.calibration import DECISION, fit_threshold
from models.learning.metrics import FEW_GROUPS, PUBLISHED_REWARD_ROWS
from models.learning.sharded_files import content_digest
from models.learning.training import BackboneModule

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
    """The figures of a tested model, with all that is needed to read them.

    Args:
        model: A model that has been tested.
        data: What it was tested on.
        source: Which weights were tested.
    """
    found = data.contamination
    rows = data.row_counts
    partial = model.test_count < rows["test"]
    published = data.tests_published_rows and not partial
    record = {
        "task": model.task,
        "weights": source,
        "backbone": model.hparams["backbone"],
        "split": data.description,
        "rows": rows,
        "tested_rows": model.test_count,
        "truncated_rows": dict(data.truncated),
        "contamination": {
            "test_rows": found.test_rows,
            "contaminated_rows": found.contaminated_rows,
            "fraction": found.fraction,
            "validated_rows": found.validated_rows,
            "allowed": data.contamination_allowed,
        },
        "calibration": None if model.calibration is None else asdict(model.calibration),
        "readings": _readings(model),
        "test": model.test_metrics,
        "baselines": _baselines(model, data),
        "published": PUBLISHED_REWARD_ROWS if published else {},
        "versions": versions(),
    }
    return record | {"notes": notes(record)}


def notes(record: Mapping[str, Any]) -> list[str]:
    """What has to be known in order to read a test's figures, a sentence each; grave ones begin in capitals."""
    said = []
    if record["contamination"]["allowed"]:
        said.append("CONTAMINATED: trained on scenes that it is tested on")
    found = record["contamination"]
    of_rows = f"of {found['test_rows']} test rows have a history that"
    stamp = "CONTAMINATED: " if found["contaminated_rows"] else ""
    said.append(f"{stamp}{found['contaminated_rows']} {of_rows} was trained on")
    if found["validated_rows"] is None:
        said.append(
            "VALIDATION UNKNOWN: the checkpoint does not say which rows chose its best weights and calibrated it"
        )
    elif found["validated_rows"]:
        said.append(f"VALIDATED ON: {found['validated_rows']} {of_rows} chose the best weights and calibrated them")
    if record["tested_rows"] < record["rows"]["test"]:
        said.append(
            f"PARTIAL: figures of {record['tested_rows']} of the {record['rows']['test']} test rows "
            "(trainer.limit_test_batches)"
        )
    said += _one_sided(record)
    scenes, low = record["test"]["raw"]["scenes"], "accuracy_low" in record["test"]["raw"]
    said.append(intervals_note(int(scenes), "scenes") if low else "no intervals: all rows are of one scene")
    if not record["baselines"]:
        said.append("no baselines: the rows that the model was trained on are not at hand")
    said.append(f"raw and calibrated decide above {DECISION:g}")
    fitted = record["calibration"]
    if fitted is None:
        said.append(
            "NOT CALIBRATED: no validation ran after a training step, so probabilities are as the network gives them"
        )
    elif fitted["rows"] is None:
        said.append("calibrated on validation rows, how many the checkpoint does not say")
    else:
        how = "PARTLY CALIBRATED: " if fitted["rows"] < fitted["of_rows"] else "calibrated "
        said.append(f"{how}on {fitted['rows']} of {fitted['of_rows']} validation rows")
    return said


def intervals_note(groups: int, what: str) -> str:
    """What intervals rest on, in words."""
    few = f", too few to rely on (less than {FEW_GROUPS})" if groups < FEW_GROUPS else ""
    return f"in brackets: 95% bootstrap intervals over {groups} {what}{few}"


def _one_sided(record: Mapping[str, Any]) -> list[str]:
    """Which kinds of rows are all decided alike though people decided them differently."""
    figures = record["test"].get("calibrated", record["test"]["raw"])
    said = []
    for what, rejected, accepted in (
        ("silence", Category.MISSED_NEED, Category.NON_RESPONSE),
        ("proposal", Category.FALSE_ALARM, Category.CORRECT_DETECTION),
    ):
        if not figures.get(f"rows_{rejected}") or not figures.get(f"rows_{accepted}"):  # an agent has no categories
            continue
        share = figures[f"rows_{rejected}"] / (figures[f"rows_{rejected}"] + figures[f"rows_{accepted}"])
        agreement = figures[f"agreement_{rejected}"], figures[f"agreement_{accepted}"]
        if agreement == (0, 1):
            said.append(f"EVERY {what.upper()} IS ACCEPTED: people reject {share:.0%} of them")
        if agreement == (1, 0):
            said.append(f"EVERY {what.upper()} IS REJECTED: people accept {1 - share:.0%} of them")
    return said


def _baselines(model: BackboneModule, data: RowsDataModule) -> dict[str, dict[str, float]]:
    """What judges that do not read come to on the same rows, by what they do; none where there is nothing to fit on."""
    scores, rows = data.word_scores, model.test_rows
    if scores is None:
        return {}
    place_N = rows["row"] - (data.row_counts["test"] - data.decision_count("test"))
    words_N = scores.test[place_N]
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
        figures = model.decision_metrics(score_N, rows, above)
        found[name] = {figure: float(value) for figure, value in figures.items()}
    return found


def _readings(model: BackboneModule) -> dict[str, str]:
    """The readings of the model's test, by name, in words; without a threshold they decide at `DECISION`."""
    labels = {"raw": "raw", "calibrated": "calibrated"}
    if model.calibration is not None:
        labels["f1_optimal"] = f"greatest F1, above {model.calibration.f1_threshold:.4f}"
    return {name: labels[name] for name in model.test_metrics}


def tested_record(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The record of the test that `trainer` has just run, with a digest of the checkpoint that it tested, if any."""
    assert isinstance(pl_module, BackboneModule)
    data = trainer.datamodule  # type: ignore[attr-defined]
    path = trainer.ckpt_path
    digest = content_digest(Path(path)) if path else None
    return run_record(pl_module, data, str(path or "in memory")) | {"weights_digest": digest}


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    packages = {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES}
    return {"python": platform.python_version(), **packages}
