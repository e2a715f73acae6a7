"""log.jsonl: every question and answer, written as soon as it is known."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.corpus.json_records import parse_json
from datamodules.files.reading import MAX_RECORDS_BYTES, open_file, text_lines
from models.judging.answer_log import AnswerLog
from proactive.simulation.questions import Question
from proactive.simulation.work_items import WorkItem

LOG_FILE = "log.jsonl"
OUTCOME = "outcome"


class SimulationLog(AnswerLog):
    """The log of a simulation. Sessions that wait for the disk at the same time share one sync of the file."""

    def __init__(self) -> None:
        super().__init__()
        self._syncing: asyncio.Task[None] | None = None
        self._unsynced = False

    def keep(
        self,
        item: WorkItem,
        question: Question[Any],
        attempt: int,
        text: str,
        finish_reason: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Add an answer that does not come from an endpoint; `seconds` is the time of its computation."""
        notes = {**question.record(), "attempt": attempt, **({} if seconds is None else {"seconds": seconds})}
        self.add(self.key(item, question, attempt), text, item.name, finish_reason, notes=notes)

    @staticmethod
    def key(item: WorkItem, question: Question[Any], attempt: int) -> str:
        """Return the key of an answer."""
        return f"{item.name} {question.digest[:32]} {attempt}"

    def end(self, item: WorkItem, outcome: dict[str, Any]) -> None:
        """Store how a work item ended. It is not run again."""
        self.add(f"{OUTCOME} {item.name}", json.dumps(outcome), item.name, notes={"kind": OUTCOME})

    def outcome(self, item: WorkItem) -> dict[str, Any] | None:
        """Return how a work item ended; None if it has not ended."""
        text = self.texts.get(f"{OUTCOME} {item.name}")
        return None if text is None else json.loads(text)

    async def synced(self) -> None:
        """Wait until all added lines are on the disk."""
        if self._unsynced:
            if self._syncing is None:
                self._syncing = asyncio.create_task(self._sync())
            await self._syncing

    async def _sync(self) -> None:
        await asyncio.sleep(0)  # so that concurrent sessions add their lines first
        self._syncing, self._unsynced = None, False
        self._sync_file()

    def _append(self, entry: dict[str, Any]) -> None:
        self._write(entry)
        self._unsynced = True


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log. The first line is left out, because it contains the settings.

    Raises:
        UserError: It cannot be read, or a line is not JSON.
    """
    with open_file(path, MAX_RECORDS_BYTES) as file:
        for number, (where, line) in enumerate(text_lines(file, path)):
            if number:
                yield parse_json(line, where)
