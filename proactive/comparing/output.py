"""What a comparison writes and prints."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.files.run_folders import REPORT_FILE
from datamodules.files.writing import write_atomically
from proactive.comparing.page import NAMES, baseline_label, comparison_page
from proactive.comparing.setting import Setting
from proactive.comparing.spreadsheets import differences_csv, metrics_csv
from proactive.tables import Table

COMPARISON_FILE = "compare.json"
METRICS_TABLE = "metrics.csv"
DIFFERENCES_FILE = "differences.csv"


def write_comparison(record: Mapping[str, Any], settings: Mapping[str, Sequence[Setting]], folder: Path) -> None:
    """Write all files of a comparison, the record last; see `compare` for the arguments."""
    write_atomically(folder / METRICS_TABLE, metrics_csv(record))
    write_atomically(folder / DIFFERENCES_FILE, differences_csv(record))
    write_atomically(folder / REPORT_FILE, comparison_page(record, settings, folder))
    write_atomically(folder / COMPARISON_FILE, json.dumps(record, indent=2) + "\n")


def comparison_tables(record: Mapping[str, Any]) -> list[Table]:
    """The tables of a comparison for a terminal."""
    tables = []
    for found in record["kinds"].values():
        tables += [_metrics_table(found), *([_differences_table(found)] if found["differences"] else [])]
        tables.append(_settings_table(found))
        tables += [_text_table("Cannot be compared", _pairs(found))] if found["incomparable"] else []
    return tables + ([_text_table("Left out", record["left_out"])] if record["left_out"] else [])


def _pairs(found: Mapping[str, Any]) -> dict[str, str]:
    return {" and ".join(one["settings"]): one["reason"] for one in found["incomparable"]}


def _metrics_table(found: Mapping[str, Any]) -> Table:
    columns = list(next(iter(found["settings"].values()))["metrics"])
    table = Table(found["title"], "; ".join(found["notes"]))
    for title in ("", *(NAMES.get(name, name) for name in columns), "rows", found["groups"], "folds", "seeds"):
        table.add_column(title)
    for name, one in found["settings"].items():
        seeds = len(one["seeds"]) if one["seeds"] != [None] else ""
        counts = (one["rows"], one[found["groups"]], len(one["folds"]) or "", seeds)
        table.add_row(name, *_cells(one["metrics"], ".3f"), *map(str, counts))
    for one in found["baselines"]:
        table.add_row(baseline_label(one, found), *_cells(one["metrics"], ".3f"))
    return table


def _differences_table(found: Mapping[str, Any]) -> Table:
    table = Table("Differences on the same rows, with paired intervals")
    columns = found["differences"][0]["metrics"]
    for title in ("", *(NAMES.get(name, name) for name in columns), "rows", found["groups"]):
        table.add_column(title)
    for one in found["differences"]:
        rows = f"{one['rows']}" + (f" ({one['rows_of_one_alone']} of only one)" if one["rows_of_one_alone"] else "")
        cells = _cells(one["metrics"], "+.3f")
        table.add_row(f"{one['of']} - {one['minus']}", *cells, rows, str(one[found["groups"]]))
    return table


def _cells(metrics: Mapping[str, Mapping[str, float | None]], form: str) -> list[str]:
    short = form.replace("3", "2")  # so that a value and its interval fit in a line

    def cell(one: Mapping[str, float | None]) -> str:
        interval = "" if one["low"] is None else f" [{one['low']:{short}}, {one['high']:{short}}]"
        return f"{one['value']:{form}}{interval}"

    return [cell(one) for one in metrics.values()]


def _settings_table(found: Mapping[str, Any]) -> Table:
    table = Table("Settings")
    for title in ("", *found["settings"]):
        table.add_column(title)
    table.add_row("runs", *(one["where"] for one in found["settings"].values()))
    for name, values in found["options"].items():
        table.add_row(name, *("" if value is None else str(value) for value in values))
    return table


def _text_table(title: str, content: Mapping[str, str]) -> Table:
    table = Table(title, show_header=False)
    for left, right in content.items():
        table.add_row(left, right)
    return table
