"""A simulation from its scenes to its folder: trials side by side, then the training data of all that finished."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.corpus.json_records import parse_json
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.traces import root_traces
from datamodules.errors import UserError
from datamodules.files.reading import open_file, text_lines
from datamodules.files.run_folders import CONFIG_FILE, REPORT_FILE
from datamodules.files.safe_yaml import NotYamlError, read_yaml
from datamodules.files.writing import write_atomically
from models.judging.budget import LimitReachedError, Price
from models.judging.chat_client import ChatClient
from proactive.simulation.log import LOG_FILE, SimulationLog
from proactive.simulation.loop import LoopOptions, TrialFailedError, TrialLoop
from proactive.simulation.page import report
from proactive.simulation.questions import ROLES, Players
from proactive.simulation.scenes import (
    SCENES_FILE,
    SceneDescription,
    read_scenes,
    scenes_digest,
    scenes_text,
    trials_of,
)
from proactive.simulation.summary import SUMMARY_FILE, summary
from proactive.simulation.traces import TRACES, read_simulated, write_trace
from proactive.simulation.training_data import training_data, write_training_data

Say = Callable[[str], None]


class StoppedError(UserError):
    """A simulation has stopped before its end; the next call goes on."""


@dataclass(frozen=True)
class Simulation:
    """What is to be simulated.

    Attributes:
        scenes: The scenes, without example events of test traces unless that is allowed.
        examples: What was found of such events, for the record: see `prepared`.
        trials: Sessions of each scene.
        seed: Determines start times and the random numbers of scripted roles.
        options: The bounds of each trial.
        at_once: Trials that run side by side; it changes no result.
        failures: How many trials may fail, or be stopped by an endpoint, before the others are stopped too.
        config: The options as YAML, to be kept in the folder.
    """

    scenes: Sequence[SceneDescription]
    examples: dict[str, Any]
    trials: int
    seed: int
    options: LoopOptions
    at_once: int
    failures: int
    config: str

    def settings(self, players: Players) -> dict[str, Any]:
        """All that determines the result."""
        return {
            "scenes": scenes_digest(self.scenes),
            "trials": self.trials,
            "seed": self.seed,
            **asdict(self.options),
            "roles": {name: role.describe() for name, role in players.items()},
            "examples": self.examples,
        }


def events_of_test_traces(root: str) -> set[str]:
    """The texts of all events of a data root's test traces."""
    return {event.event for trace in root_traces(load_corpus(root)) for event in trace.events}


def prepared(
    scenes: Sequence[SceneDescription], root: str, contaminated: bool
) -> tuple[list[SceneDescription], dict[str, Any]]:
    """The scenes without example events of a data root's test traces, and how many there are.

    Args:
        scenes: The scenes.
        root: The data root.
        contaminated: Whether such examples stay, and the result is marked.
    """
    tested = events_of_test_traces(root)
    examples = [event for scene in scenes for event in scene.environment.events_example]
    found = sum(event in tested for event in examples)
    record = {
        "root": root,
        "examples": len(examples),
        "examples_of_test_traces": found,
        "contaminated": contaminated and found > 0,
    }
    return (list(scenes) if contaminated else [scene.without_examples(tested) for scene in scenes]), record


async def simulate(
    simulation: Simulation,
    players: Players,
    clients: Sequence[ChatClient],
    log: SimulationLog,
    folder: Path,
    say: Say,
) -> None:
    """Simulate all trials that the folder does not hold yet.

    What an endpoint refuses, or does not answer, stops its trial alone; the next call goes on with it.

    Args:
        simulation: What is to be simulated.
        players: Who plays the roles.
        clients: What asks endpoints for them.
        log: Keeps questions and answers.
        folder: The simulation's.
        say: Tells how trials end.

    Raises:
        StoppedError: Not all trials have ended, because of an endpoint or a limit.
        UserError: The folder belongs to another simulation, or another process uses it.
    """
    with log.opened(folder / LOG_FILE, simulation.settings(players)):
        write_atomically(folder / SCENES_FILE, scenes_text(simulation.scenes))
        if not (folder / CONFIG_FILE).exists():
            write_atomically(folder / CONFIG_FILE, simulation.config)
        trials = trials_of(simulation.scenes, simulation.trials, simulation.seed)
        left = [trial for trial in trials if log.outcome(trial) is None]
        if len(left) < len(trials):
            say(f"{len(trials) - len(left)} of {len(trials)} trials are there")
        async with contextlib.AsyncExitStack() as stack:
            for client in clients:
                await stack.enter_async_context(client)
            loops = [TrialLoop(trial, players, log, simulation.options) for trial in left]
            await _side_by_side(loops, folder, simulation.at_once, simulation.failures, say)


async def _side_by_side(loops: Sequence[TrialLoop], folder: Path, at_once: int, failures: int, say: Say) -> None:
    room = asyncio.Semaphore(at_once)
    stopped: list[UserError] = []
    limits: list[UserError] = []
    failed = 0

    async def one(loop: TrialLoop) -> None:
        nonlocal failed
        async with room:
            if limits:
                return
            try:
                outcome = await _simulate_trial(loop, folder)
                said = outcome["reason"] or outcome["end"]
                failed += outcome["end"] == "failed"
            except UserError as error:
                said = f"stopped: {error.what}"
                (limits if isinstance(error, LimitReachedError) else stopped).append(error)
        say(f"{loop.trial.name}: {said}")
        if failed + len(stopped) > failures:
            raise StoppedError(
                f"more than {failures} trials failed, the last one: {said}",
                f"Answers so far are kept in {LOG_FILE}. See --failures.",
            )

    try:
        async with asyncio.TaskGroup() as group:
            for loop in loops:
                group.create_task(one(loop))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the other tasks were cancelled
    for error in [*stopped, *limits]:
        raise StoppedError(error.what, error.hint)


async def _simulate_trial(loop: TrialLoop, folder: Path) -> dict[str, Any]:
    """Simulate a trial, and write its trace before its end is noted: what has an end is not simulated again."""
    outcome = {"trial": loop.trial.name, "end": "failed", "cause": "", "reason": ""}
    try:
        outcome["end"] = await loop.run()
    except TrialFailedError as error:
        outcome |= {"cause": error.cause, "reason": f"failed: {error}"}
    else:
        write_trace(folder / TRACES / f"{loop.trial.name}.json", loop.steps)
    loop.log.end(loop.trial, outcome)
    await loop.log.synced()
    return outcome


def derive(folder: Path) -> dict[str, Any]:
    """Write training data, summary and report of a simulation's log and traces, and return the summary.

    Raises:
        UserError: The folder is not a simulation's, or a file in it does not fit.
    """
    settings = _settings(folder / LOG_FILE)
    traces = read_simulated(folder)
    files = training_data(traces, json.dumps(settings["roles"]["judge"]))
    write_training_data(folder, files)
    tested = events_of_test_traces(settings["examples"]["root"])
    record = summary(folder, settings, read_scenes(folder), traces, files, tested, _prices(folder / CONFIG_FILE))
    write_atomically(folder / SUMMARY_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / REPORT_FILE, report(record, traces))
    return record


def _prices(path: Path) -> dict[str, Price]:
    """By role, the price that a simulation's config names."""
    try:
        config = read_yaml(path)
        return {role: Price(**config[role]["price"]) for role in ROLES}
    except (OSError, NotYamlError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: {error}", "Give a folder that `simulate traces` wrote, with all its files."
        ) from error


def _settings(path: Path) -> dict[str, Any]:
    with open_file(path, None) as file:
        first = parse_json(next((line for _, line in text_lines(file, path)), "null"), str(path))
    if not isinstance(first, dict) or "examples" not in first.get("settings", {}):
        raise UserError(f"{path} is not the log of a simulation", "Give a folder that `simulate traces` wrote.")
    return first["settings"]
