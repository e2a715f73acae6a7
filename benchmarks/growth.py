"""How time and memory grow with the data: from 1,000 to 100,000 rows, and traces of 50 to 5,000 events.

    python benchmarks/growth.py --plot docs/growth.svg

Rows are simulated, with as many scenes as they need. Each measurement is a process of its own, with one thread and with
networks so small that what is measured is the work around them. Given are the time of the whole process, on the clock
and of the processor, and its peak memory. The exponent is the slope of log(time - start) over log(size), in processor
time, where start is the time at size `--start`. An exponent of 1 is linear growth.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from datamodules.corpus.records import AnnotatedRow, TestStep
from datamodules.corpus.simulator import simulate
from datamodules.corpus.sources import TEST_FILE, TRACES, TRAIN_FILE

Part = Literal["inspect", "first step", "judge", "agent"]
ROOT = Path(__file__).parents[1]
NETWORK = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
SMALL = [
    f"--model.scratch={json.dumps(NETWORK)}",
    "--data.vocabulary_size=1000",
    "--trainer.accelerator=cpu",
    "--quiet",
]
PARTS: dict[Part, str] = {  # and what grows
    "inspect": "rows",
    "first step": "rows",
    "judge": "events",
    "agent": "events",
}


def main(
    rows: list[int] = [1_000, 3_000, 10_000, 30_000, 100_000],  # noqa: B006
    events: list[int] = [50, 150, 500, 1_500, 5_000],  # noqa: B006
    parts: list[Part] = list(PARTS),  # noqa: B006
    start: int = 20,
    plot: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure every part at every size, and print times, memory and exponents.

    Args:
        rows: How many annotated rows.
        events: How long a trace.
        parts: What to measure: inspect; the first training step; a reward classifier that judges an offer after each
            event of a trace; an agent that answers each event of a trace.
        start: The size whose time counts as that of starting the process.
        plot: Where to draw time against size, as SVG.
    """
    sizes = {"rows": rows, "events": events}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models = _small_models(work) if {"judge", "agent"} & set(parts) else {}
        for part in parts:
            measured = {}
            for size in (start, *sizes[PARTS[part]]):
                Console(stderr=True).print(f"{part}: {size} {PARTS[part]} ...")
                measured[size] = _measured(part, size, work, models)
            seconds = {size: one["cpu_seconds"] for size, one in measured.items()}
            found[part] = {"grows": PARTS[part], "sizes": measured, "exponent": _exponent(seconds)}
    _show(found)
    print(json.dumps(found))
    if plot:
        _draw(found, plot)
    return found


def write_root(folder: Path, rows: int, events: int = 0) -> Path:
    """A data root of some simulated rows, and one test trace of some events."""
    lines: list[str] = []
    seed = 0
    while len(lines) < rows:
        lines += [_line(row, seed) for row in simulate(seed)[0][: rows - len(lines)]]
        seed += 1
    for name, content in ((TRAIN_FILE, lines), (TEST_FILE, [_line(row, -1) for row in simulate(-1)[1]])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(content), encoding="utf-8")
    if events:
        (folder / TRACES).mkdir()
        (folder / TRACES / "long.json").write_text(json.dumps(_long_trace(events)), encoding="utf-8")
    return folder


def _line(row: AnnotatedRow, seed: int) -> str:
    """A row in the published layout; its times tell the simulations apart, and so their scenes."""
    history = [{"time": f"{event.time} of {seed}", "event": event.event} for event in row.history]
    content = {
        "obs": history,
        "pred_task": row.proposal,
        "valid": row.accepted,
        "help_needed": row.help_needed,
        "annotation": row.annotation,
    }
    return json.dumps(content) + "\n"


def _long_trace(events: int) -> list[dict[str, Any]]:
    """The events of many simulated sessions, one after the other, as one trace."""
    steps: list[TestStep] = []
    seed = 1
    while len(steps) < events:
        steps += [step for trace in simulate(seed)[2].values() for step in trace]
        seed += 1
    return [
        {
            "observation": {"time": str(60 * number), "event": step.observation.event},
            "agent_response": {"candidate_task": []},
            "task_status": step.task_status,
        }
        for number, step in enumerate(steps[:events])
    ]


def _small_models(work: Path) -> dict[str, Path]:
    """A judge and an agent of one training step."""
    root = write_root(work / "for models", 1_600)
    for task in ("reward", "agent"):
        options = [f"--task={task}", f"--data.root={root}", "--trainer.max_steps=1", f"--run.root={work / 'runs'}"]
        _run("proactive.fit", *SMALL, *options, cwd=work)
    return {task: work / "runs" / task / "0" for task in ("reward", "agent")}


def _measured(part: Part, size: int, work: Path, models: dict[str, Path]) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        place = Path(folder)
        if PARTS[part] == "rows":
            root = write_root(place / "root", size)
            inspect = ("proactive.inspect", f"--root={root}", "--folds=3", "--examples=0", "--quiet")
            step = ("proactive.fit", *SMALL, f"--data.root={root}", "--data.folds=3", "--data.cache=false")
            only = ("--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0")
            return _run(*(inspect if part == "inspect" else (*step, *only)), cwd=place)
        root = write_root(place / "root", 200, size)
        judge = f"--judge.checkpoint={models['reward']}"
        agents = {
            "judge": ["--agent.baseline=always-propose"],
            "agent": [f"--agent.checkpoint={models['agent']}", "--agent.answers.max_new_tokens=8"],
        }
        options = [*agents[part], judge, f"--data.root={root}", "--output=out", "--quiet"]
        return _run("proactive.evaluate", "agent", *options, cwd=place)


def _run(module: str, *arguments: str, cwd: Path) -> dict[str, float]:
    """Seconds on the clock and of the processor, and peak memory in GiB, of a command's process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "huggingface")}
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=cwd, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with exit code {os.waitstatus_to_exitcode(status)}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": usage.ru_maxrss / 2**20}


def _exponent(seconds: dict[int, float]) -> float:
    """The slope of log(time - start) over log(size), by least squares; start is the time of the first size."""
    import numpy as np

    (_, start), *others = seconds.items()
    points = [(math.log(size), math.log(taken - start)) for size, taken in others if taken > start]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else math.nan


def _show(found: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Growth")
    for title in ("part", "size", "seconds", "of them processor", "peak memory, GiB", "exponent"):
        table.add_column(title, justify="left" if title == "part" else "right")
    for part, one in found.items():
        for size, figures in one["sizes"].items():
            cells = [f"{size:,} {one['grows']}", f"{figures['seconds']:.1f}", f"{figures['cpu_seconds']:.1f}"]
            table.add_row(part, *cells, f"{figures['peak_gib']:.2f}", "")
        table.add_row(part, "", "", "", "", f"{one['exponent']:.2f}", end_section=True)
    Console(width=100).print(table)


def _draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, grows in zip(axes, ("rows", "events"), strict=True):
        for part, one in found.items():
            if one["grows"] == grows:
                sizes = list(one["sizes"])
                seconds = [one["sizes"][size]["cpu_seconds"] for size in sizes]
                axis.plot(sizes, seconds, "o-", label=f"{part} (exponent {one['exponent']:.2f})")
        axis.set(xscale="log", yscale="log", xlabel=grows, ylabel="processor seconds, start included")
        axis.grid(True, alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
