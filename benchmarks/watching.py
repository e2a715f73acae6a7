"""Reading an export of ActivityWatch: events a second from the file to sentences, and peak memory.

    python benchmarks/watching.py

Each export is a simulated recording of windows, tabs, files in editors and presence, with e-mail addresses and
addresses with tokens in it. Each is read by a process of its own, whose peak memory is measured. Nearly all titles
differ, which is the slowest case.
"""

import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from proactive.assistant.activitywatch import ExportSource
from proactive.assistant.clock import ReplayClock
from proactive.assistant.privacy import PrivacyOptions

TYPES = {
    "windows": "currentwindow",
    "tabs": "web.tab.current",
    "code": "app.editor.activity",
    "presence": "afkstatus",
}
BEGIN = 1_750_000_000.0  # epoch seconds


def recorded(random: Random) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """Yield bucket, start, seconds and data of events without end."""
    at = BEGIN
    while True:
        seconds, number = random.choice((1.0, 2.0, 5.0, 10.0, 30.0, 120.0)), random.randrange(10**6)
        kind = random.random()
        if kind < 0.3:
            yield "windows", at, seconds, {"app": "Code", "title": f"file_{number}.py - shop - Visual Studio Code"}
            yield "code", at, seconds, {"file": f"/home/ada/shop/file_{number}.py", "project": "/home/ada/shop"}
        elif kind < 0.7:
            title = f"How to do task {number} in Python? - Stack Overflow"
            url = f"https://stackoverflow.com/questions/{number}/task?token={number}#answers"
            yield "windows", at, seconds, {"app": "firefox", "title": f"{title} - Mozilla Firefox"}
            yield "tabs", at, seconds, {"url": url, "title": title, "incognito": random.random() < 0.1}
        else:
            title = f"Re: invoice {number} to ada.{number}@example.org"
            yield "windows", at, seconds, {"app": random.choice(("Mail", "Slack", "Writer")), "title": title}
        if random.random() < 0.05:
            yield "presence", at, seconds, {"status": "not-afk"}
        at += seconds + 0.5


def write_export(path: Path, events: int) -> Path:
    """Write an export with a number of events."""
    buckets: dict[str, Any] = {bucket: {"id": bucket, "type": kind, "events": []} for bucket, kind in TYPES.items()}
    for _, (bucket, start, seconds, data) in zip(range(events), recorded(Random(0)), strict=False):
        timestamp = datetime.fromtimestamp(start, UTC).isoformat()
        buckets[bucket]["events"].append({"timestamp": timestamp, "duration": seconds, "data": data})
    path.write_text(json.dumps({"buckets": buckets}), encoding="utf-8")
    return path


def measure(path: Path) -> dict[str, float]:
    """Read an export to its end: seconds, sentences, and the peak memory of this process in MiB."""

    async def observed() -> int:
        source = ExportSource(path, ReplayClock(), PrivacyOptions())
        return len([None async for _ in source.observations()])

    begin = time.perf_counter()
    observations = asyncio.run(observed())
    seconds = time.perf_counter() - begin
    unit = 1024 if sys.platform == "linux" else 1024**2  # of the system's figure, to MiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"seconds": seconds, "observations": observations, "peak": peak}


def main(events: tuple[int, ...] = (1_000, 25_000, 50_000, 100_000)) -> dict[int, dict[str, float]]:
    """Measure exports.

    Args:
        events: Numbers of events in the exports.
    """
    table = Table(title="Reading an export of ActivityWatch")
    for name in ("events", "file (MiB)", "seconds", "events a second", "observations", "peak memory (MiB)"):
        table.add_column(name, justify="right")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in events:
            path = write_export(Path(folder) / f"{number}.json", number)
            with get_context("spawn").Pool(1) as pool:
                one = found[number] = pool.apply(measure, (path,))
            size, rate = path.stat().st_size / 2**20, number / one["seconds"]
            table.add_row(
                f"{number:,}", f"{size:.1f}", f"{one['seconds']:.2f}", f"{rate:,.0f}", f"{one['observations']:,}",
                f"{one['peak']:.0f}",
            )  # fmt: skip
    Console().print(table)
    return found


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
