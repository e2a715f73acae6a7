"""Writes scene descriptions from seed tasks, for `simulate scenes`. The role writer gets one question per scene."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datamodules.corpus.json_records import validate
from datamodules.files.run_folders import REPORT_FILE
from datamodules.files.writing import write_atomically
from models.judging.budget import Price
from models.judging.chat_client import ChatClient
from proactive.simulation.asking import ask
from proactive.simulation.concurrent_work import Limits, Say, opened_folder, run_all
from proactive.simulation.questions import Question, Role, SceneAnswer
from proactive.simulation.scenes import SCENES_FILE, SceneDescription, scenes_text
from proactive.simulation.seed_tasks import Seeds, tasks_in_turn
from proactive.simulation.simulation_log import LOG_FILE, SimulationLog
from proactive.simulation.simulation_report import scenes_report
from proactive.simulation.simulation_summary import SUMMARY_FILE, scenes_summary
from proactive.simulation.work_items import RoleName, WorkItem, digest

MAX_SAMPLES = 10  # sample events in one question
WRITTEN = "written"


@dataclass(frozen=True)
class SceneDraft(WorkItem):
    """One scene to write.

    Attributes:
        kind: The kind of work.
        task: The seed task.
    """

    kind: str
    task: str

    def facts_for(self, role: RoleName) -> dict[str, Any]:
        return {}  # the question contains everything

    def question(self, seeds: Seeds) -> Question[SceneAnswer]:
        """Return the question to the writer, with sample events of the kind, drawn at random."""
        events = list(dict.fromkeys(seeds[self.kind].sample_events))
        drawn = self.random("samples").sample(events, min(MAX_SAMPLES, len(events)))
        return Question("writer", "scene", {"kind": self.kind, "task": self.task, "sample_events": drawn}, SceneAnswer)


@dataclass(frozen=True)
class SceneWriting:
    """The scenes to write, and the settings that determine them.

    Attributes:
        seeds: The seed tasks, with the sample events that the writer may see.
        samples: Counts of sample events: see `without_test_samples`.
        tested: The texts of all events in the data root's test traces.
        count: Number of scenes; one per task if None.
        seed: Determines which sample events are drawn, and the random numbers of a scripted writer.
        limits: The limits of all scenes together.
        config: The options as YAML, which the folder stores.
    """

    seeds: Seeds
    samples: dict[str, Any]
    tested: Collection[str]
    count: int | None
    seed: int
    limits: Limits
    config: str

    def drafts(self) -> list[SceneDraft]:
        """Return the scenes to write. The first ones do not depend on `count`."""
        tasks = list(tasks_in_turn(self.seeds))
        named = ((f"scene_{number:03}", *task) for number, task in enumerate(cycle(tasks), 1))
        return [
            SceneDraft(name, digest([self.seed, name, kind, task]), kind, task)
            for name, kind, task in islice(named, self.count or len(tasks))
        ]

    def settings(self, writer: Role[SceneDraft]) -> dict[str, Any]:
        """Return everything that determines the result."""
        return {
            "command": "scenes",
            "seeds": digest({kind: seed.model_dump() for kind, seed in self.seeds.items()})[:16],
            "scenes": self.count,
            "seed": self.seed,
            "roles": {"writer": writer.describe()},
            "samples": self.samples,
        }


async def write_scenes(
    writing: SceneWriting,
    writer: Role[SceneDraft],
    clients: Sequence[ChatClient],
    log: SimulationLog,
    folder: Path,
    say: Say,
) -> None:
    """Write all scenes that the folder's log does not contain.

    Args:
        writing: The scenes to write.
        writer: The writer.
        clients: The client of a writer that is an endpoint.
        log: The log that the writer and its client write to.
        folder: The output folder.
        say: Prints how each scene ended.

    Raises:
        StoppedError: Not all scenes have ended, because of an endpoint or a limit.
        UserError: The folder belongs to other options, or another process uses it.
    """

    async def do(draft: SceneDraft) -> dict[str, Any]:
        question = draft.question(writing.seeds)
        answer = await ask(writer, question, draft, log)
        shown = any(event in writing.tested for event in question.facts["sample_events"])
        return {"end": WRITTEN, "scene": {**answer.model_dump(), "contaminated": shown}}

    async with opened_folder(folder, writing.config, writing.settings(writer), log, clients, say):
        await run_all(writing.drafts(), do, "scenes", log, writing.limits, say)


def derive_scenes(
    writing: SceneWriting, writer: Role[SceneDraft], price: Price, log: SimulationLog, folder: Path
) -> dict[str, Any]:
    """Write scenes.yaml, summary and report from the log, and return the summary.

    Args:
        writing: The scenes that were to be written.
        writer: The writer.
        price: The price of its tokens.
        log: The log, with all answers.
        folder: The output folder.
    """
    outcomes = [outcome for draft in writing.drafts() if (outcome := log.outcome(draft)) is not None]
    scenes = {
        outcome["name"]: validate(outcome["scene"], SceneDescription, f"{folder / LOG_FILE}, {outcome['name']}")
        for outcome in outcomes
        if outcome["end"] == WRITTEN
    }
    record = scenes_summary(folder, writing.settings(writer), outcomes, scenes, writing.tested, price)
    if scenes:
        write_atomically(folder / SCENES_FILE, scenes_text(list(scenes.values())))
    write_atomically(folder / SUMMARY_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / REPORT_FILE, scenes_report(record, scenes))
    return record
