"""Runs work items concurrently. If one fails, the others go on, up to a number of failures."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from datamodules.errors import UserError
from datamodules.files.run_folders import CONFIG_FILE
from datamodules.files.writing import write_atomically
from models.judging.budget import LimitReachedError
from models.judging.chat_client import ChatClient
from proactive.simulation.asking import NoValidAnswerError
from proactive.simulation.simulation_log import LOG_FILE, SimulationLog
from proactive.simulation.work_items import WorkItem

FAILED = "failed"
Say = Callable[[str], None]
Item = TypeVar("Item", bound=WorkItem)


class StoppedError(UserError):
    """The simulation stopped before all work items had ended. The same command with its folder continues."""


@dataclass(frozen=True)
class Limits:
    """How many work items run at once, and when all stop. These limits change no result.

    Attributes:
        at_once: Maximum number of concurrent items.
        failures: Number of items that may fail, or be stopped by an endpoint, before all others are stopped.
    """

    at_once: int
    failures: int


@contextlib.asynccontextmanager
async def opened_folder(
    folder: Path, config: str, settings: dict[str, Any], log: SimulationLog, clients: Sequence[ChatClient], say: Say
) -> AsyncIterator[None]:
    """Open the output folder: within this context, its log and the clients are open.

    Args:
        folder: The output folder, new or of a stopped simulation.
        config: The options as YAML, which are stored in a new folder.
        settings: Everything that determines the result.
        log: The log to open.
        clients: The clients of endpoints.
        say: Prints how to continue after a stop.

    Raises:
        UserError: The folder's log has other settings, or another process uses it.
    """
    with log.opened(folder / LOG_FILE, settings):
        say(f"output: {folder}, which the same options with --output {folder} continue after a stop")
        if not (folder / CONFIG_FILE).exists():
            write_atomically(folder / CONFIG_FILE, config)
        async with contextlib.AsyncExitStack() as stack:
            for client in clients:
                await stack.enter_async_context(client)
            yield


async def run_all(
    items: Sequence[Item],
    do: Callable[[Item], Awaitable[dict[str, Any]]],
    what: str,
    log: SimulationLog,
    limits: Limits,
    say: Say,
) -> None:
    """Run all work items that the log does not list as ended.

    Args:
        items: The items.
        do: Runs one item, writes its file if it has one, and returns its outcome: how it ended, and further fields.
        what: What the items are, in the plural, for messages.
        log: The open log. It stores the outcome of each item.
        limits: The limits.
        say: Prints how each item ended.

    Raises:
        StoppedError: Too many items have failed, or an endpoint or a limit has stopped some.
    """
    remaining = [item for item in items if log.outcome(item) is None]
    if len(remaining) < len(items):
        say(f"{len(items) - len(remaining)} of {len(items)} {what} have ended before")
    stopped: list[UserError] = []
    limit_reached: list[UserError] = []
    failed = 0

    async def run(item: Item) -> None:
        nonlocal failed
        try:
            outcome = await _outcome(item, do)
            log.end(item, outcome)  # after the item's file, because an item with an outcome is not run again
            await log.synced()
            said = outcome["reason"] or outcome["end"]
            failed += outcome["end"] == FAILED
        except UserError as error:
            said = f"stopped: {error.what}"
            (limit_reached if isinstance(error, LimitReachedError) else stopped).append(error)
        say(f"{item.name}: {said}")
        if failed + len(stopped) > limits.failures:
            raise StoppedError(
                f"more than {limits.failures} {what} failed, the last one: {said}",
                f"Answers so far are kept in {LOG_FILE}. See --failures.",
            )

    async def worker() -> None:
        for item in waiting:
            if not limit_reached:
                await run(item)

    waiting = iter(remaining)  # all workers take their next item from it
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(limits.at_once, len(remaining))):
                group.create_task(worker())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the other tasks were cancelled
    for error in [*stopped, *limit_reached]:
        raise StoppedError(error.what, error.hint)


async def _outcome(item: Item, do: Callable[[Item], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    try:
        return {"name": item.name, "cause": "", "reason": "", **await do(item)}
    except NoValidAnswerError as error:
        return {"name": item.name, "end": FAILED, "cause": error.cause, "reason": f"failed: {error}"}
