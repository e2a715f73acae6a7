"""The time that the simulation itself takes: sessions with scripted roles, which answer at once, and a log on disk.

    python benchmarks/simulated_sessions.py

One process simulates `trials` sessions of each embedded scene. Events of the user and of the assistant are counted. The
time of writing the training data afterwards is not included.
"""

import asyncio
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli

from proactive.simulation.concurrent_work import Limits
from proactive.simulation.questions import Roles
from proactive.simulation.scenes import embedded_scenes
from proactive.simulation.scripted_roles import ScriptedRole
from proactive.simulation.session_loop import LoopOptions
from proactive.simulation.simulated_traces import read_simulated
from proactive.simulation.simulation_log import SimulationLog
from proactive.simulation.trace_simulation import TraceSimulation, simulate
from proactive.simulation.work_items import ROLE_NAMES


def main(trials: int = 20, at_once: int = 32) -> dict[str, float]:
    """Simulate, and print sessions and events a second.

    Args:
        trials: Sessions per scene.
        at_once: Maximum number of concurrent sessions.
    """
    simulation = TraceSimulation(embedded_scenes(), {}, trials, 0, LoopOptions(), Limits(at_once, 0), "")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        log = SimulationLog()
        roles: Roles = dict.fromkeys(ROLE_NAMES, ScriptedRole(log))
        begin = time.perf_counter()
        asyncio.run(simulate(simulation, roles, [], log, Path(folder), lambda text: None))
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
