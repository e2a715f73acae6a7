"""Runs a command's coroutine such that a signal ends it in order."""

import asyncio
import signal
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
BLOCKED_SECONDS = 1.0  # a loop that has not noticed a signal by then is blocked by a model's computation


class SignalReceivedError(SystemExit):
    """Ctrl-C or SIGTERM has ended a coroutine. Its exit code is the shell's, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def run_until_signal(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in an event loop of its own. The first SIGINT or SIGTERM cancels it.

    Signal handlers that raise would interrupt any code, also that of the loop and of task groups, which wrap what they
    catch. So an exception is raised only while a computation blocks the loop, or at a second signal.

    Args:
        main: The coroutine.

    Raises:
        SignalReceivedError: A signal has ended it; it has cleaned up.
    """
    received: list[int] = []

    async def run() -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"

        def cancel() -> None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            task.cancel()

        def stop(number: int, frame: FrameType | None) -> None:
            received.append(number)
            if len(received) > 1:
                interrupt(number, frame)
            signal.setitimer(signal.ITIMER_REAL, BLOCKED_SECONDS)
            loop.call_soon_threadsafe(cancel)

        def interrupt(number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        handlers = {**dict.fromkeys(SIGNALS, stop), signal.SIGALRM: interrupt}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return await main
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    try:
        return asyncio.run(run())
    except (asyncio.CancelledError, KeyboardInterrupt):
        if received:
            raise SignalReceivedError(received[0]) from None
        raise
