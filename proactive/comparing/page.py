"""report.html of a comparison: tables of all metrics and differences, plots, and learning curves over each other."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.files.run_folders import REPORT_FILE
from models.reporting.plots import image, new_axes
from models.reporting.templating import template_environment
from proactive.comparing.setting import Setting

PLOTTED = ("f1", "auroc", "false_alarm")  # metrics of the plots with intervals
CURVES = {  # by metric, the label of its axis
    "train/loss": "loss",
    "validation/loss": "loss",
    "validation/auroc": "AUROC",
    "validation/f1": "F1",
    "validation/preference_loss": "loss",
    "validation/preference_accuracy": "fraction of pairs",
    "validation/reward": "reward",
}
NAMES = {"f1": "F1", "auroc": "AUROC", "false_alarm": "false alarm"}


def comparison_page(record: Mapping[str, Any], settings: Mapping[str, Sequence[Setting]], folder: Path) -> str:
    """The page as HTML. Text from options and paths is escaped.

    Args:
        record: The content of compare.json.
        settings: The settings of each kind.
        folder: The folder of the page, to which its links are relative.
    """
    plots = {kind: _plots(record["kinds"][kind], found) for kind, found in settings.items()}
    links = {
        str(run.folder): os.path.relpath(run.folder / REPORT_FILE, folder)
        for found in settings.values()
        for setting in found
        for run in setting.runs
    }
    page = template_environment().get_template("comparison_report.html")
    return page.render(record=record, plots=plots, links=links, names=NAMES, baseline_label=baseline_label)


def _plots(found: Mapping[str, Any], settings: Sequence[Setting]) -> dict[str, str]:
    metrics = next(iter(found["settings"].values()))["metrics"]
    plots = {NAMES[name]: _metric_plot(found, name) for name in PLOTTED if name in metrics}
    if found["differences"]:
        plots |= {f"Difference in {NAMES[name]}": _difference_plot(found, name) for name in PLOTTED if name in metrics}
    return plots | _curve_plots(settings)


def _metric_plot(found: Mapping[str, Any], name: str) -> str:
    """The value of each setting and baseline with its interval, and as small dots the values of single runs."""
    axes = new_axes(NAMES[name], "")
    lines = {label: one["metrics"][name] for label, one in found["settings"].items()}
    for label, one in found["settings"].items():
        values = [run["metrics"][name] for run in one["runs"]]
        if len(values) > 1:
            axes.plot(values, [label] * len(values), "|", color="grey", markersize=9, zorder=1)
    lines |= {baseline_label(one, found): one["metrics"][name] for one in found["baselines"]}
    _intervals(axes, lines)
    return image(axes)


def baseline_label(baseline: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The name of a baseline, with the settings on whose rows it was measured if these are not all."""
    rows_of = baseline["rows_of"]
    return baseline["name"] + ("" if len(rows_of) == len(found["settings"]) else f" (rows of {', '.join(rows_of)})")


def _difference_plot(found: Mapping[str, Any], name: str) -> str:
    axes = new_axes(f"difference in {NAMES[name]}", "")
    axes.axvline(0, color="grey", linestyle=":")
    _intervals(axes, {f"{one['of']} - {one['minus']}": one["metrics"][name] for one in found["differences"]})
    return image(axes)


def _intervals(axes: Any, lines: Mapping[str, Mapping[str, float | None]]) -> None:
    for number, (label, metric) in enumerate(lines.items()):
        low, high = (metric[end] if metric[end] is not None else metric["value"] for end in ("low", "high"))
        axes.plot([low, high], [label, label], color=f"C{number % 10}")
        axes.plot(metric["value"], label, "o", color=f"C{number % 10}")
    axes.set_ylim(len(lines) - 0.5, -0.5)  # the first one on top
    axes.figure.set_figheight(max(1.4 + 0.3 * len(lines), 2.0))


def _curve_plots(settings: Sequence[Setting]) -> dict[str, str]:
    """The curves of all runs, those of a setting in one color."""
    plots = {}
    for name, unit in CURVES.items():
        if not any(name in run.curves for setting in settings for run in setting.runs):
            continue
        axes = new_axes("optimizer step", unit)
        for number, setting in enumerate(settings):
            label = setting.name
            for run in setting.runs:
                if points := run.curves.get(name):
                    style: dict[str, Any] = {"linewidth": 1} if name.startswith("train/") else {"marker": "."}
                    axes.plot(
                        list(points), list(points.values()), color=f"C{number % 10}", alpha=0.7, label=label, **style
                    )
                    label = "_same"  # one entry of the legend for all runs of a setting
        plots[name] = image(axes)
    return plots
