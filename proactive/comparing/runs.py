"""Reads runs and evaluations, and what each decided on its test rows."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from datamodules.corpus.json_records import read_json, read_jsonl, validate
from datamodules.errors import UserError
from datamodules.files.reading import MAX_RECORDS_BYTES
from datamodules.files.run_folders import (
    ANSWERS_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    DECISIONS_FILE,
    FOLD_PLACEHOLDER,
    FOLDS_FILE,
    LOGS,
    METRICS_FILE,
    VERDICTS_FILE,
    holds_folds,
)
from datamodules.files.safe_yaml import NotYamlError, read_yaml
from models.learning.calibration import DECISION
from models.learning.checkpoint_contents import RunOptions
from models.learning.checkpoint_paths import LAST
from models.learning.pooling import FN, FP, TN, TP, UNDECIDED, DecidedRows, outcomes
from models.reporting.decided_rows import DecidedRow
from models.reporting.run_page import read_curves
from models.reporting.timeline import TIMELINE_FILE, ShownTraces

REWARD, DECISION_TO_OFFER, EVALUATION = "reward", "agent", "evaluation"  # kinds of tests
KINDS = {"reward": REWARD, "agent": DECISION_TO_OFFER, "preference": DECISION_TO_OFFER, "online": DECISION_TO_OFFER}
OUTCOMES = {"tp": TP, "fp": FP, "tn": TN, "fn": FN, "undecided": UNDECIDED}
BASELINES = ("bag_of_words", "majority")


class LeftOut(Exception):  # noqa: N818 - no error: the others are compared
    """A folder that cannot be compared; the text says why."""


class Record(BaseModel):
    """What a comparison reads of metrics.json."""

    model_config = ConfigDict(extra="allow")
    hint: ClassVar[str] = "Test the run again, or leave it out."

    task: str
    notes: list[str] = []
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class ComparedRun:
    """A finished run, or a finished evaluation of an agent.

    Attributes:
        folder: Its folder.
        kind: What it tests: only equal kinds are compared.
        options: What it was given, by full name, {fold} in place of the number of a fold. An evaluation has the
            settings of agent, judge and gate.
        group: Runs with equal texts differ in seed and fold only.
        seed: Seed of the training; None for an evaluation.
        fold: The fold that tests; None without folds.
        rows: What it decided.
        baselines: What baselines decide on these rows, by name.
        metrics: Other metrics of the test, by name.
        judge: A digest of the judge and of the traces of an evaluation; empty for a run.
        record: The content of metrics.json.
        curves: The result of `read_curves`.
    """

    folder: Path
    kind: str
    options: Mapping[str, Any]
    group: str
    seed: int | None
    fold: int | None
    rows: DecidedRows
    baselines: Mapping[str, DecidedRows]
    metrics: Mapping[str, float]
    judge: str
    record: Mapping[str, Any]
    curves: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @property
    def contaminated(self) -> bool:
        """Whether it was tested on data that it was trained on."""
        return any(note.startswith("CONTAMINATED") for note in self.record["notes"])

    @property
    def warnings(self) -> list[str]:
        """The notes of the test that warn."""
        return [note for note in self.record["notes"] if note.split(":")[0].isupper()]


def read_run(folder: Path) -> ComparedRun:
    """Read a finished run or evaluation.

    Raises:
        LeftOut: It is unfinished, from an earlier version, or damaged.
    """
    try:
        return _evaluation(folder) if (folder / ANSWERS_FILE).is_file() else _run(folder)
    except UserError as error:
        raise LeftOut(error.what) from error


def _run(folder: Path) -> ComparedRun:
    if not (folder / METRICS_FILE).exists():
        last, how = folder / CHECKPOINTS / LAST, "it has no checkpoint yet"
        if last.exists():
            how = f"resume with: python -m proactive.fit --ckpt_path {shlex.quote(str(last))}"
        raise LeftOut(f"unfinished; {how}")
    if not (folder / DECISIONS_FILE).exists():
        raise LeftOut(f"there is no {DECISIONS_FILE}: an earlier version tested it")
    _, record = read_json(folder / METRICS_FILE, Record)
    decided = read_jsonl(folder / DECISIONS_FILE, DecidedRow)
    options = read_options(folder / CONFIG_FILE)
    by_scene = options["data"].get("split") == "by_scene"
    given = settings(options) | _of_each_fold(folder)
    raw = record["test"].get("calibrated", record["test"]["raw"])
    baselines = {name: _rows(decided, name) for name in BASELINES if all(getattr(r, name) is not None for r in decided)}
    return ComparedRun(
        folder=folder,
        kind=KINDS[record["task"]],
        options=given,
        group=json.dumps(given, sort_keys=True),
        seed=int(options["seed_everything"]),
        fold=options["data"].get("fold") if by_scene else None,
        rows=_rows(decided, "probability"),
        baselines=baselines,
        metrics={name: value for name, value in raw.items() if isinstance(value, float)},
        judge="",
        record={**record, "notes": record.get("notes", [])},
        curves=read_curves(folder / LOGS),
    )


def _rows(decided: Sequence[DecidedRow], column: str) -> DecidedRows:
    """The rows of a run with the probabilities of a column."""
    score_N = torch.tensor([float(getattr(row, column)) for row in decided], dtype=torch.float64)
    positive_N = torch.tensor([bool(row.target) for row in decided], dtype=torch.bool)
    return DecidedRows(
        tuple(row.row for row in decided),
        tuple(row.scene for row in decided),
        outcomes(score_N > DECISION, positive_N),
        score_N,
        positive_N,
        torch.zeros(len(decided), dtype=torch.int64),
    )


# Options that change no metric, or only by rounding: where and how fast steps are computed, and what is logged.
WITHOUT_EFFECT = frozenset(
    {f"model.{name}" for name in ("attn_implementation", "gradient_checkpointing", "compile")}
    | {f"data.{name}" for name in ("fold", "layout", "token_budget", "micro_batch_size", "num_workers", "cache")}
    | {
        f"trainer.{name}"
        for name in (
            *("accelerator", "strategy", "devices", "num_nodes", "plugins", "benchmark", "profiler"),
            *("callbacks", "logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary"),
            *("detect_anomaly", "deterministic", "default_root_dir", "max_time", "num_sanity_val_steps"),
        )
    }
    | {"seed_everything", "folds"}
)


def settings(options: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """The options of a run that may change its metrics, without seed and fold, by full name.

    Args:
        options: The options, or those of a group.
        group: The beginning of their full names, such as `model.`.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        full = group + name
        if full not in WITHOUT_EFFECT and full != "run":
            found |= settings(value, f"{full}.") if isinstance(value, dict) else {full: value}
    return found


def _of_each_fold(folder: Path) -> dict[str, Any]:
    """The options that differ between the folds of a cross-validation, as they were given, with a placeholder."""
    of_folds = folder.absolute().parents[1]
    given = settings(read_options(of_folds / FOLDS_FILE)) if holds_folds(of_folds) else {}
    return {name: value for name, value in given.items() if isinstance(value, str) and FOLD_PLACEHOLDER in value}


def read_options(path: Path) -> dict[str, Any]:
    """The content of config.yaml or folds.yaml.

    Raises:
        UserError: It does not hold the options of a run.
    """
    try:
        content = read_yaml(path)
    except NotYamlError as error:
        raise UserError(f"{path} is not YAML: {error}", "Leave the run out.") from error
    validate(content, RunOptions, str(path))
    options: dict[str, Any] = content
    return options


def _evaluation(folder: Path) -> ComparedRun:
    if not (folder / METRICS_FILE).exists():
        raise LeftOut(f"unfinished; its own command with --output {folder} resumes it")
    _, record = read_json(folder / METRICS_FILE, Record)
    shown, _ = read_json(folder / TIMELINE_FILE, ShownTraces, MAX_RECORDS_BYTES)
    names: list[str] = []
    groups: list[str] = []
    found: list[int] = []
    for trace in shown.traces:
        events = json.dumps([[event.time, event.event] for event in trace.events])
        digest = hashlib.blake2b(events.encode(), digest_size=8).hexdigest()
        for number, step in enumerate(trace.steps):
            names.append(f"{digest}, event {number}")
            groups.append(trace.name)
            found.append(OUTCOMES[step.outcome])
    outcome_N = torch.tensor(found, dtype=torch.int64)
    nothing_N = torch.zeros(len(found), dtype=torch.int64)
    rows = DecidedRows(tuple(names), tuple(groups), outcome_N, None, nothing_N.bool(), nothing_N)
    given: dict[str, Any] = {}
    for who in ("agent", "judge", "gate"):
        for name, value in (record.get(who) or {}).items():
            if name == "weights":
                given[f"{who}.weights"] = ", ".join(dict.fromkeys(value.values()))
            elif name not in ("calibration", "truncated_rows", "curve", "without_gate", "held_back"):
                given[who if name == who else f"{who}.{name}"] = value
    return ComparedRun(
        folder=folder,
        kind=EVALUATION,
        options=given,
        group=str(folder),
        seed=None,
        fold=None,
        rows=rows,
        baselines={},
        metrics={},
        judge=_first_line(folder / VERDICTS_FILE),
        record={**record, "notes": record.get("notes", [])},
    )


def _first_line(path: Path) -> str:
    """The settings of the judge's log: everything that determines its verdicts, its weights and the traces included."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.sha256(file.readline()).hexdigest()
