"""Local models compute in a thread of their own, so that sources and answers do not wait for them."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class ModelThread:
    """One thread for all models of a session: several would compete for cores, and keep more memory."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "models")

    async def run(self, make: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Run a coroutine of a local model in the thread, and return its result.

        Args:
            make: Makes the coroutine. It may wait for nothing but the model.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: asyncio.run(make()))


async def here(make: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a coroutine in the event loop of the session, where clients of endpoints have their connections."""
    return await make()
