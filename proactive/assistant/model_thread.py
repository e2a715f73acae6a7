"""The thread in which local models compute, so that the event loop can go on with observations and answers."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class ModelThread:
    """One thread for all models of a session. With several threads they would compete for cores and memory."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "models")

    async def run(self, make: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Run a coroutine of a local model in the thread, and return its result.

        Args:
            make: Makes the coroutine. It must not wait for anything of the session's event loop.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: asyncio.run(make()))


async def run_in_event_loop(make: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a coroutine in the event loop of the session, where clients of endpoints have their connections."""
    return await make()
