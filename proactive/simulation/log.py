"""log.jsonl: every question and answer, as soon as it is there."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.corpus.json_records import parse_json
from datamodules.files.reading import MOST_ROWS, open_file, text_lines
from datamodules.files.writing import sync
from models.judging.answer_log import AnswerLog
from proactive.simulation.questions import Question
from proactive.simulation.scenes import Trial

LOG_FILE = "log.jsonl"
OUTCOME = "outcome"


class SimulationLog(AnswerLog):
    """A log whose lines reach the disk together where several trials wait for that."""

    def __init__(self) -> None:
        super().__init__()
        self._syncing: asyncio.Task[None] | None = None
        self._unsynced = False

    def keep(self, trial: Trial, question: Question[Any], attempt: int, text: str) -> None:
        """Add an answer that no endpoint gave."""
        key = self.key(trial, question, attempt)
        self.add(key, text, trial.name, notes={**question.record(), "attempt": attempt})

    @staticmethod
    def key(trial: Trial, question: Question[Any], attempt: int) -> str:
        """Identifies an answer."""
        return f"{trial.name} {question.digest[:32]} {attempt}"

    def end(self, trial: Trial, outcome: dict[str, Any]) -> None:
        """Note how a trial ended; it is not simulated again."""
        self.add(f"{OUTCOME} {trial.name}", json.dumps(outcome), trial.name, notes={"kind": OUTCOME})

    def outcome(self, trial: Trial) -> dict[str, Any] | None:
        """How a trial ended, if it did."""
        text = self.texts.get(f"{OUTCOME} {trial.name}")
        return None if text is None else json.loads(text)

    async def synced(self) -> None:
        """Wait until all that was added is on the disk."""
        if self._unsynced:
            if self._syncing is None:
                self._syncing = asyncio.create_task(self._sync())
            await self._syncing

    async def _sync(self) -> None:
        await asyncio.sleep(0)  # trials that run side by side add their lines first
        self._syncing, self._unsynced = None, False
        if self._file is not None:
            sync(self._file)

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()  # a kill of this process loses nothing; a sync keeps it if the machine stops
            self._unsynced = True


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The answers of a log, one by one, behind the first line, which holds the settings.

    Raises:
        UserError: It cannot be read, or a line is no JSON.
    """
    with open_file(path, MOST_ROWS) as file:
        for number, (where, line) in enumerate(text_lines(file, path)):
            if number:
                yield parse_json(line, where)
