"""metrics.csv and differences.csv of a comparison."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.escaping import to_cell


def metrics_csv(record: Mapping[str, Any]) -> str:
    """Metrics of all settings and baselines, one a line."""
    lines: list[list[Any]] = [
        ["kind", "setting", "where", "seeds", "folds", "rows", "groups", "metric", "value", "low", "high"]
    ]
    for kind, found in record["kinds"].items():
        for name, one in found["settings"].items():
            place = [one["where"], len(one["seeds"]), len(one["folds"]), one["rows"], one[found["groups"]]]
            baselines = {base["name"]: base["metrics"] for base in found["baselines"] if name in base["rows_of"]}
            for label, metrics in {name: one["metrics"], **baselines}.items():
                lines += [[kind, label, *place, metric, *value.values()] for metric, value in metrics.items()]
    return _csv(lines)


def differences_csv(record: Mapping[str, Any]) -> str:
    """All differences, one a line."""
    lines: list[list[Any]] = [["kind", "of", "minus", "rows", "groups", "seeds", "metric", "difference", "low", "high"]]
    for kind, found in record["kinds"].items():
        for one in found["differences"]:
            seeds = " and ".join(map(str, one["seeds"]))
            place = [kind, one["of"], one["minus"], one["rows"], one[found["groups"]], seeds]
            lines += [[*place, metric, *value.values()] for metric, value in one["metrics"].items()]
    return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([[to_cell(cell) if isinstance(cell, str) else cell for cell in line] for line in lines])
    return text.getvalue()
