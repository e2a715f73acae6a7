"""Simulating sessions with scripted roles, which answer at once: what the loop itself takes, with its log on the disk.

    python benchmarks/simulation.py

One process plays `trials` sessions of each embedded scene, so many side by side. Figures count user's and assistant's
events; the training data that is derived afterwards is not in them.
"""

import asyncio
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli

from proactive.simulation.log import SimulationLog
from proactive.simulation.loop import LoopOptions
from proactive.simulation.questions import ROLES, Players
from proactive.simulation.scenes import embedded_scenes
from proactive.simulation.scripted import ScriptedRole
from proactive.simulation.simulation import Simulation, simulate
from proactive.simulation.traces import read_simulated


def main(trials: int = 20, at_once: int = 32) -> dict[str, float]:
    """Simulate, and print sessions and events a second.

    Args:
        trials: Sessions of each scene.
        at_once: Sessions side by side.
    """
    simulation = Simulation(embedded_scenes(), {}, trials, 0, LoopOptions(), at_once, 0, "")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        log = SimulationLog()
        players: Players = dict.fromkeys(ROLES, ScriptedRole(log))
        begin = time.perf_counter()
        asyncio.run(simulate(simulation, players, [], log, Path(folder), lambda text: None))
        seconds = time.perf_counter() - begin
        traces = read_simulated(Path(folder))
    events = sum(map(len, traces.values()))
    print(
        f"{len(traces)} sessions, {events} events, {at_once} at once: {seconds:.2f} s, "
        f"{len(traces) / seconds:.1f} sessions/s, {events / seconds:.0f} events/s, "
        f"{1000 * seconds / events:.2f} ms/event"
    )
    return {"sessions": len(traces), "events": events, "seconds": seconds}


if __name__ == "__main__":
    auto_cli(main)
