"""Counts and times of a session, for the table at its end."""

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from proactive.assistant.session_log import EventEntry, ReplyEntry, read_session
from proactive.tables import Table


def summary(folder: Path) -> dict[str, Any]:
    """Count the entries of a session.

    Returns:
        `events` by decision, `replies` by kind, and `milliseconds` per event that the agent was asked about: p50 and
        p95 of agent, gate and both.

    Raises:
        UserError: The folder holds no session.
    """
    events: Counter[str] = Counter()
    replies: Counter[str] = Counter()
    seconds: dict[str, array[float]] = {name: array("d") for name in ("agent", "gate", "both")}
    for entry in read_session(folder)[1]:
        if isinstance(entry, EventEntry):
            events[entry.decision.value] += 1
            if entry.agent_seconds is not None:
                seconds["agent"].append(entry.agent_seconds)
                seconds["both"].append(entry.agent_seconds + (entry.gate_seconds or 0.0))
            if entry.probability is not None and entry.gate_seconds is not None:
                seconds["gate"].append(entry.gate_seconds)
        elif isinstance(entry, ReplyEntry):
            replies[entry.reply.value] += 1
    milliseconds = {
        name: {f"p{share}": 1000 * float(np.percentile(found, share)) for share in (50, 95)}
        for name, found in seconds.items()
        if found
    }
    return {"events": dict(events), "replies": dict(replies), "milliseconds": milliseconds}


def summary_table(found: dict[str, Any]) -> Table:
    """Return the table of a `summary`."""
    table = Table(title="Session", caption="milliseconds per event that the agent was asked about: p50, p95")
    table.add_column("")
    table.add_column("number", justify="right")
    for kind in ("events", "replies"):
        for name, count in found[kind].items():
            table.add_row(f"{kind}: {name}", f"{count:,}")
    for name, times in found["milliseconds"].items():
        table.add_row(f"milliseconds: {name}", f"{times['p50']:.1f}, {times['p95']:.1f}")
    return table
