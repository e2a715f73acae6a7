"""Compares settings: metrics over folds and seeds, and differences on the rows that two settings have tested."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from datamodules.errors import UserError
from models.learning.metrics import FEW_GROUPS
from models.learning.pooling import Estimate, metric_differences, pooled_metrics
from models.reporting.run_record import versions
from proactive.comparing.runs import (
    BASELINES,
    DECISION_TO_OFFER,
    EVALUATION,
    REWARD,
    ComparedRun,
    LeftOut,
    read_run,
)
from proactive.comparing.setting import Setting, differing_options, group_runs

TITLES = {
    REWARD: "Reward classifiers",
    DECISION_TO_OFFER: "Agents: the decision to offer help",
    EVALUATION: "Agents under a judge",
}
METRICS = {
    REWARD: ("accuracy", "precision", "recall", "f1", "auroc"),
    DECISION_TO_OFFER: ("accuracy", "precision", "recall", "f1", "auroc"),
    EVALUATION: ("recall", "precision", "accuracy", "false_alarm", "f1"),
}
GROUPS = {REWARD: "scenes", DECISION_TO_OFFER: "scenes", EVALUATION: "traces"}
# Metrics that follow from no decision: their mean over the runs of a setting is reported.
MEANS = (
    *("loss", "loss_text", "loss_null", "calibration_error"),
    *("preference_accuracy", "preference_loss", "reward_margin", "reward", "held_out_reward", "offer_rate"),
)
HINT = "Give folders of finished runs."


def compare(folders: Sequence[Path], contaminated: bool = False) -> tuple[dict[str, Any], dict[str, list[Setting]]]:
    """Compare runs and evaluations.

    Args:
        folders: Their folders, as `find_folders` returns them.
        contaminated: Whether to use runs that were tested on what they were trained on.

    Returns:
        The content of compare.json, and the settings of each kind.

    Raises:
        UserError: There is no run to compare; the message says why the first one is left out.
    """
    left_out: dict[Path, str] = {}
    runs: dict[str, list[ComparedRun]] = {}
    for folder in folders:
        try:
            run = read_run(folder)
            if run.contaminated and not contaminated:
                raise LeftOut("CONTAMINATED: it was tested on data that it was trained on; --contaminated keeps it")
        except LeftOut as reason:
            left_out[folder] = str(reason)
            continue
        runs.setdefault(run.kind, []).append(run)
    if not runs:
        folder, why = next(iter(left_out.items()))
        more = f" (and {len(left_out) - 1} others)" if len(left_out) > 1 else ""
        raise UserError(f"no run can be compared: {folder}{more}: {why}", HINT)
    settings: dict[str, list[Setting]] = {}
    for kind in [kind for kind in TITLES if kind in runs]:
        settings[kind], twice = group_runs(runs[kind])
        left_out |= twice
    record = {
        "kinds": {kind: _kind_record(kind, found) for kind, found in settings.items()},
        "left_out": {str(folder): reason for folder, reason in left_out.items()},
        "versions": versions(),
    }
    return record, settings


def _kind_record(kind: str, settings: Sequence[Setting]) -> dict[str, Any]:
    differences, incomparable = [], []
    for one, other in combinations(settings, 2):
        try:
            differences.append(_difference(kind, one, other))
        except LeftOut as reason:
            incomparable.append({"settings": [one.name, other.name], "reason": str(reason)})
    of_baselines = [found for setting in settings for found in _baseline_differences(kind, setting)]
    record = {
        "title": TITLES[kind],
        "groups": GROUPS[kind],
        "settings": {setting.name: _setting_record(kind, setting) for setting in settings},
        "baselines": _baselines(kind, settings),
        "options": differing_options(settings),
        "differences": [*differences, *of_baselines],
        "incomparable": incomparable,
    }
    return record | {"notes": list(_notes(kind, settings, record))}


def _setting_record(kind: str, setting: Setting) -> dict[str, Any]:
    seeds = setting.seeds
    per_seed = {str(seed): pooled_metrics([rows]) for seed, rows in seeds.items()}
    return {
        "where": setting.where,
        "seeds": list(seeds),
        "folds": setting.folds,
        "rows": len(setting.names),
        "rows_of_some_seeds": setting.rows_of_some_seeds,
        GROUPS[kind]: setting.groups,
        "metrics": _chosen(kind, pooled_metrics(list(seeds.values()))),
        "per_seed": {
            seed: {name: one[name].value for name in METRICS[kind] if name in one} for seed, one in per_seed.items()
        },
        "means": _means(setting),
        "runs": [_run_record(kind, run) for run in setting.runs],
    }


def _baselines(kind: str, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """The metrics of baselines on the rows of each setting. Settings for which they are equal share an entry."""
    found: list[dict[str, Any]] = []
    for name in BASELINES:
        for setting in settings:
            rows = setting.baseline(name)
            if rows is None:
                continue
            metrics = _chosen(kind, pooled_metrics(rows))
            same = [one for one in found if (one["name"], one["metrics"]) == (_words(name), metrics)]
            if same:
                same[0]["rows_of"].append(setting.name)
            else:
                found.append({"name": _words(name), "rows_of": [setting.name], "metrics": metrics})
    return found


def _run_record(kind: str, run: ComparedRun) -> dict[str, Any]:
    found = pooled_metrics([run.rows])
    facts = run.record.get("run") or {}
    return {
        "folder": str(run.folder),
        "seed": run.seed,
        "fold": run.fold,
        "rows": len(run.rows.names),
        "metrics": {name: found[name].value for name in METRICS[kind] if name in found},
        "seconds": facts.get("seconds"),
        "device": facts.get("device"),
        "warnings": run.warnings,
    }


def _means(setting: Setting) -> dict[str, dict[str, float | int | None]]:
    """Mean and standard deviation over the runs of a setting, by metric."""
    found: dict[str, dict[str, float | int | None]] = {}
    for name in MEANS:
        values = [run.metrics[name] for run in setting.runs if name in run.metrics]
        if values:
            found[name] = {
                "mean": mean(values),
                "deviation": stdev(values) if len(values) > 1 else None,
                "runs": len(values),
            }
    return found


def _difference(kind: str, one: Setting, other: Setting) -> dict[str, Any]:
    """The metrics of `other` minus those of `one` on the rows that both have tested.

    Raises:
        LeftOut: There is no such row, or the judges differ.
    """
    if len({run.judge for run in (*one.runs, *other.runs)}) > 1:
        raise LeftOut(
            "another judge, or other traces: what one judge accepts says nothing about another one's verdicts"
        )
    common = one.names & other.names
    if not common:
        raise LeftOut("no test row in common: their data, or the judgments in them, differ")
    ours, theirs = ([rows.only(common) for rows in setting.seeds.values()] for setting in (one, other))
    return {
        "of": other.name,
        "minus": one.name,
        "rows": len(common),
        "rows_of_one_alone": len(one.names ^ other.names),
        GROUPS[kind]: len(set(ours[0].groups)),
        "seeds": [len(theirs), len(ours)],
        "metrics": _chosen(kind, metric_differences(theirs, ours)),
    }


def _baseline_differences(kind: str, setting: Setting) -> Iterator[dict[str, Any]]:
    for name in BASELINES:
        rows = setting.baseline(name)
        if rows is not None:
            seeds = list(setting.seeds.values())
            yield {
                "of": setting.name,
                "minus": _words(name),
                "rows": len(setting.names),
                "rows_of_one_alone": 0,
                GROUPS[kind]: setting.groups,
                "seeds": [len(seeds), len(seeds)],
                "metrics": _chosen(kind, metric_differences(seeds, rows)),
            }


def _chosen(kind: str, metrics: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {name: asdict(metrics[name]) for name in METRICS[kind] if name in metrics}


def _words(baseline: str) -> str:
    return baseline.replace("_", " ")


def _notes(kind: str, settings: Sequence[Setting], record: Mapping[str, Any]) -> Iterator[str]:
    """What a reader has to know about the metrics, a sentence each. Warnings start with capitals."""
    what = GROUPS[kind]
    runs = [run for setting in settings for run in setting.runs]
    for start, meaning in (
        ("CONTAMINATED", "tested on data that they were trained on"),
        ("PARTIAL", "tested on a part of their test rows"),
        ("VALIDATED ON", "tested on data that chose their best weights"),
    ):
        if marked := [str(run.folder) for run in runs if any(note.startswith(start) for note in run.warnings)]:
            yield f"{start}: {len(marked)} of {len(runs)} are {meaning}: {', '.join(marked)}"
    if kind != EVALUATION and (single := [one.name for one in settings if len(one.seeds) == 1]):
        yield f"ONE SEED: how much another seed changes the metrics of {', '.join(single)} is not known"
    for setting in settings:
        if setting.rows_of_some_seeds:
            yield (
                f"MISSING FOLDS: not all seeds of {setting.name} have all folds, so its metrics leave out "
                f"{setting.rows_of_some_seeds} rows"
            )
    if few := [one.name for one in settings if one.groups < FEW_GROUPS]:
        yield f"FEW {what.upper()}: less than {FEW_GROUPS} for {', '.join(few)}, too few to rely on the intervals"
    yield (
        f"in brackets: 95% intervals over {what} drawn with replacement, of the mean over seeds; they state what other "
        f"{what} would change, and not what other seeds would change"
    )
    if len(record["differences"]) > 1:
        yield (
            f"{len(record['differences'])} differences: without any true difference, about one interval in 20 leaves "
            "out 0 by chance"
        )
    for package in ("python", "proactive", "torch", "transformers", "lightning"):
        used = sorted({run.record.get("versions", {}).get(package, "unknown") for run in runs})
        if len(used) > 1:
            yield f"different versions of {package}: {', '.join(used)}"
