"""Time in tests: one limit against hangs, and a clock that a test turns forward itself."""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Seconds after which a test takes what it waits for to be hung. Far above what anything here needs, for a busy machine
# is no fault. On a very slow machine set the factor: PROACTIVE_TEST_PATIENCE=4 pytest
HANG = 900.0 * float(os.environ.get("PROACTIVE_TEST_PATIENCE", "1"))
HOUR = 3600.0  # a time limit that only a clock turned forward reaches


class Clock:
    """The clock of event loops, which runs as always and can be turned forward from any thread."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    def time(self, loop: asyncio.AbstractEventLoop) -> float:
        self._loop = loop
        return time.monotonic() + self._ahead

    def advance(self, seconds: float) -> None:
        """Turn the clock forward and wake the loop that was last running."""
        self._ahead += seconds
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: None)


@contextmanager
def turnable_clock() -> Iterator[Clock]:
    """Within the block, all event loops follow the clock that is given."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.BaseEventLoop, "time", lambda loop: clock.time(loop))
        yield clock
