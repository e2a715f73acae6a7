"""Simulates the sessions of scenes, for `simulate traces`, and derives the other files from their traces."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.corpus.json_records import parse_json
from datamodules.errors import UserError
from datamodules.files.reading import open_file, text_lines
from datamodules.files.run_folders import CONFIG_FILE, REPORT_FILE
from datamodules.files.safe_yaml import NotYamlError, read_yaml
from datamodules.files.writing import write_atomically
from models.judging.chat_client import ChatClient
from proactive.simulation.concurrent_work import Limits, Say, opened_folder, run_all
from proactive.simulation.contamination import events_of_test_traces
from proactive.simulation.questions import Roles
from proactive.simulation.scenes import (
    SCENES_FILE,
    SceneDescription,
    SimulatedSession,
    read_scenes,
    scenes_digest,
    scenes_text,
    sessions_of,
)
from proactive.simulation.session_loop import LoopOptions, SessionLoop
from proactive.simulation.simulated_traces import TRACES, read_simulated, write_trace
from proactive.simulation.simulation_log import LOG_FILE, SimulationLog
from proactive.simulation.simulation_report import report
from proactive.simulation.simulation_summary import SUMMARY_FILE, PlayedBy, summary
from proactive.simulation.training_data import training_data, write_training_data
from proactive.simulation.work_items import ROLE_NAMES


@dataclass(frozen=True)
class TraceSimulation:
    """The sessions to simulate, and the settings that determine them.

    Attributes:
        scenes: The scenes as the roles see them.
        examples: Counts of example events: see `without_test_events`.
        trials: Number of sessions per scene.
        seed: Determines start times and the random numbers of scripted roles.
        options: The limits of each session.
        limits: The limits of all sessions together.
        config: The options as YAML, which the folder stores.
    """

    scenes: Sequence[SceneDescription]
    examples: dict[str, Any]
    trials: int
    seed: int
    options: LoopOptions
    limits: Limits
    config: str

    def settings(self, roles: Roles) -> dict[str, Any]:
        """Return everything that determines the result."""
        return {
            "command": "traces",
            "scenes": scenes_digest(self.scenes),
            "trials": self.trials,
            "seed": self.seed,
            **asdict(self.options),
            "roles": {name: role.describe() for name, role in roles.items()},
            "examples": self.examples,
        }


async def simulate(
    simulation: TraceSimulation,
    roles: Roles,
    clients: Sequence[ChatClient],
    log: SimulationLog,
    folder: Path,
    say: Say,
) -> None:
    """Simulate all sessions that have not ended according to the folder's log.

    Args:
        simulation: The sessions to simulate.
        roles: The four roles.
        clients: The clients of roles that are endpoints.
        log: The log that the roles and clients write to.
        folder: The output folder.
        say: Prints how each session ended.

    Raises:
        StoppedError: Not all sessions have ended, because of an endpoint or a limit.
        UserError: The folder belongs to another simulation, or another process uses it.
    """

    async def do(session: SimulatedSession) -> dict[str, Any]:
        loop = SessionLoop(session, roles, log, simulation.options)
        try:
            end = await loop.run()
        finally:
            for role in roles.values():
                role.release(session)
        write_trace(folder / TRACES / f"{session.name}.json", loop.steps)
        return {"end": end}

    async with opened_folder(folder, simulation.config, simulation.settings(roles), log, clients, say):
        write_atomically(folder / SCENES_FILE, scenes_text(simulation.scenes))
        sessions = sessions_of(simulation.scenes, simulation.trials, simulation.seed)
        await run_all(sessions, do, "sessions", log, simulation.limits, say)


def derive(folder: Path) -> dict[str, Any]:
    """Write training data, summary and report from a simulation's log and traces, and return the summary.

    Raises:
        UserError: The folder is not a simulation's, or a file in it is invalid.
    """
    settings = _settings(folder / LOG_FILE)
    traces = read_simulated(folder)
    files = training_data(traces, json.dumps(settings["roles"]["judge"]))
    write_training_data(folder, files)
    tested = events_of_test_traces(settings["examples"]["root"])
    record = summary(folder, settings, read_scenes(folder), traces, files, tested, _played_by(folder / CONFIG_FILE))
    write_atomically(folder / SUMMARY_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / REPORT_FILE, report(record, traces))
    return record


def _played_by(path: Path) -> dict[str, PlayedBy]:
    """Return what implemented each role, and at what price, from a simulation's config."""
    try:
        config = read_yaml(path)
        return {role: PlayedBy.of(config[role]) for role in ROLE_NAMES}
    except (OSError, NotYamlError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: {error}", "Give a folder that `simulate traces` wrote, with all its files."
        ) from error


def _settings(path: Path) -> dict[str, Any]:
    with open_file(path, None) as file:
        first = parse_json(next((line for _, line in text_lines(file, path)), "null"), str(path))
    if not isinstance(first, dict) or "examples" not in first.get("settings", {}):
        raise UserError(f"{path} is not the log of `simulate traces`", "Give a folder that `simulate traces` wrote.")
    return first["settings"]
