"""The results of an evaluation in the layouts of ProactiveBench: a CSV file of metrics, and judged traces."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.corpus.traces import Candidate, judged_steps
from datamodules.escaping import to_cell
from proactive.evaluation.judged_events import JudgedEvent

PUBLISHED_COLUMNS = {
    "Recall": "recall",
    "Precision": "precision",
    "Accuracy": "accuracy",
    "False-Alarm": "false_alarm",
    "F1-Score": "f1",
    "Accept Rate": "accept_rate",
    "Total Events": "events",
}


def figures_csv(record: Mapping[str, Any]) -> str:
    """Metrics of each split in the layout of the published scoring."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # with \r\n line ends, so that the writer quotes a cell that contains either
    writer.writerow(["Category", *PUBLISHED_COLUMNS])
    for name, split in record["splits"].items():
        values = [split["figures"][figure] for figure in PUBLISHED_COLUMNS.values()]
        writer.writerow([to_cell(name), *values[:-1], int(values[-1])])
    return text.getvalue()


def judged_files(events: Sequence[JudgedEvent]) -> dict[str, list[dict[str, Any]]]:
    """Each trace in the published judged layout, by name."""
    decided: dict[str, list[tuple[Candidate, bool | None]]] = {}
    traces = {event.trace.name: event.trace for event in events}
    for event in events:
        judged = event.candidates[event.deciding]
        candidate = judged.candidate if judged.proposed else Candidate(None, None, judged.candidate.notes)
        decided.setdefault(event.trace.name, []).append((candidate, judged.verdict.accepted))
    return {name: judged_steps(traces[name], steps) for name, steps in decided.items()}
