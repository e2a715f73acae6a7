"""Tables of metrics in a terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from datamodules.escaping import printable

Record = dict[str, Any]
DECISION_COLUMNS = (
    *("accuracy", "precision", "recall", "f1", "auroc", "proposed", "help_needed"),
    *("loss", "loss_text", "loss_null"),
)
REWARD_COLUMNS = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "auroc": "AUROC",
    "calibration_error": "calibration error",
    "acceptance_rate": "accepts",
}
PREFERENCE_COLUMNS = {
    "preference_accuracy": "accuracy",
    "preference_loss": "loss",
    "reward_margin": "margin",
    "reward_chosen": "accepted",
    "reward_rejected": "rejected",
}
AGENT_COLUMNS = ("recall", "precision", "accuracy", "false_alarm", "f1")
BEFORE = "before preference training"
WITHOUT_TERMINAL = 160  # characters in a line, where output goes to no terminal


class Table(RichTable):
    """A table that shows text unchanged: no markup, control characters escaped."""

    def __init__(self, title: str, caption: str | Text | None = None, **options: Any) -> None:
        below = Text(printable(caption), style="table.caption") if isinstance(caption, str) else caption
        super().__init__(title=Text(printable(title), style="table.title"), caption=below, **options)

    def add_column(self, header: str = "", **options: Any) -> None:  # type: ignore[override]
        super().add_column(Text(printable(header)), **options)

    def add_row(self, *cells: str) -> None:  # type: ignore[override]
        super().add_row(*(Text(printable(cell)) for cell in cells))


def show(*tables: Table) -> None:
    """Print tables. Their width fits the terminal, if there is one."""
    console = Console() if sys.stdout.isatty() else Console(width=WITHOUT_TERMINAL)
    for table in tables:
        console.print(table)


def reward_tables(record: Record) -> list[Table]:
    """Tables of a reward classifier's test, from its `run_record`."""
    return [_judge_table(record), _agreement_table(record)]


def _judge_table(record: Record) -> Table:
    """Metrics of a tested classifier with intervals, beside people, baselines and published rows."""
    published = ["published rows: the same rows"] if record["published"] else []
    table = Table(title=_tested(record), caption=_caption(record, published))
    table.add_column("judge")
    for title in REWARD_COLUMNS.values():
        table.add_column(title, justify="right")

    def add(label: str, metrics: Mapping[str, float]) -> None:
        table.add_row(label, *(_cell(metrics, name) for name in REWARD_COLUMNS))

    for name, label in record["readings"].items():
        add(f"this model, {label}", record["test"][name])
    add("people", {"acceptance_rate": record["test"]["raw"]["people_acceptance_rate"]})
    table.add_section()
    for label, metrics in record["baselines"].items():
        add(label, metrics)
    table.add_section()
    for label, metrics in record["published"].items():
        add(label, metrics)
    return table


def _agreement_table(record: Record) -> Table:
    """Accuracy within each category."""
    table = Table(title="Agreement within each category")
    names = [name for name in record["test"]["raw"] if name.startswith("agreement_")]
    table.add_column("judge")
    for name in names:
        table.add_column(name.removeprefix("agreement_").replace("_", " "), justify="right")
    for reading, label in record["readings"].items():
        table.add_row(label, *(f"{record['test'][reading][name]:.4f}" for name in names))
    return table


def decision_tables(record: Record) -> list[Table]:
    """The table of an agent's test, its decisions to propose, from its `run_record`."""
    table = Table(
        title=f"{_tested(record)}: the decision to propose after {record['test']['raw']['histories']:.0f} histories",
        caption=_caption(record),
    )
    table.add_column("agent")
    for name in DECISION_COLUMNS:
        table.add_column(name.replace("_", " " if name == "help_needed" else ", "), justify="right")

    def add(label: str, metrics: Mapping[str, float]) -> None:
        table.add_row(label, *(_cell(metrics, name) for name in DECISION_COLUMNS))

    for reading, label in record["readings"].items():
        add(f"this model, {label}", record["test"][reading])
    if record["before"]:
        add(BEFORE, record["before"])
    table.add_section()
    for label, metrics in record["baselines"].items():
        add(label, metrics)
    return [table]


def preference_tables(record: Record) -> list[Table]:
    """The tables of a test after preference training, from its `run_record`."""
    found = record["test"]["raw"]
    pairs = int(found.get("pairs", 0))
    table = Table(title=f"Implicit rewards of {pairs} test pairs of an accepted and a rejected proposal")
    table.add_column("agent")
    for name in PREFERENCE_COLUMNS.values():
        table.add_column(name, justify="right")
    table.add_row("this model", *(_cell(found, name) for name in PREFERENCE_COLUMNS))
    if record["before"]:
        table.add_row(BEFORE, *(_cell(record["before"], name) for name in PREFERENCE_COLUMNS))
    return [*decision_tables(record), *([table] if pairs else [])]


def agent_tables(record: Record) -> list[Table]:
    """Tables of an agent's evaluation: beside baselines and published rows, by split, by number of candidates."""
    published = ["published rows: their own judge, on 227 events"] if record["published"] else []
    agents = _agent_table("Agent", "agent", _caption(record, published))
    splits, candidates = _agent_table("By split"), _agent_table("By number of candidates")

    _add_agent(agents, "this agent", record["figures"])
    if record["gate"]:
        _add_agent(agents, "this agent, without gate", record["gate"]["without_gate"])
    for name, metrics in record["baselines"].items():
        _add_agent(agents, name, metrics)
    agents.add_section()
    for name, metrics in record["published"].items():
        _add_agent(agents, name, metrics)
    for name, split in record["splits"].items():
        _add_agent(splits, name, split["figures"])
    for k, metrics in record["figures"].get("at", {}).items():
        _add_agent(candidates, f"pred@{k}", metrics)
    return [agents, *(table for table in (splits, candidates) if table.row_count > 1)]


def _agent_table(title: str, first_column: str = "", caption: Text | None = None) -> Table:
    table = Table(title, caption)
    table.add_column(first_column)
    for name in ("recall", "precision", "accuracy", "false alarm", "F1", "TP/FP/TN/FN", "events"):
        table.add_column(name, justify="right")
    return table


def _add_agent(table: Table, label: str, metrics: Mapping[str, float]) -> None:
    counts = "/".join(str(int(metrics[key])) for key in ("tp", "fp", "tn", "fn"))
    shown = {name: value for name, value in metrics.items() if name in AGENT_COLUMNS or name.startswith("f1_")}
    table.add_row(label, *(_cell(shown, name) for name in AGENT_COLUMNS), counts, str(int(metrics["events"])))


def _tested(record: Record) -> str:
    """The split, and how many test rows were tested."""
    tested, rows = record["tested_rows"], record["rows"]["test"]
    return f"{record['split']}: {rows if tested == rows else f'{tested} of {rows}'} test rows"


def _caption(record: Record, more: list[str] | None = None) -> Text:
    """The notes of a record, warnings first and in red, then `more`."""
    warnings = [note for note in record["notes"] if note.split(":")[0].isupper()]
    others = [note for note in record["notes"] if note not in warnings]
    red = ((printable(f"{note}; "), "bold red") for note in warnings)
    return Text.assemble(*red, printable("; ".join([*others, *(more or [])])))


def _cell(metrics: Mapping[str, float], name: str) -> str:
    """A metric with four digits and its interval, if it has one; empty for a metric that is missing."""
    if name not in metrics:
        return ""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return f"{metrics[name]:.4f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
