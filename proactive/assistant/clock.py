"""Clocks: the time of this machine, and the time of a replay."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time in epoch seconds.

    Attributes:
        stepwise: Whether only `reach` advances the time. A replay then takes no longer than its computation.
    """

    stepwise: bool

    def now(self) -> float:
        """Return the time."""
        ...

    async def reach(self, at: float) -> None:
        """Wait until a time; return at once if it has passed."""
        ...

    def seconds_until(self, at: float) -> float | None:
        """Return the real seconds until a time, 0 if it has passed; None if the clock is stepwise."""
        ...


class SystemClock(Clock):
    """The time of this machine."""

    stepwise = False

    def now(self) -> float:
        return time.time()

    async def reach(self, at: float) -> None:
        await asyncio.sleep(self.seconds_until(at))

    def seconds_until(self, at: float) -> float:
        return max(at - time.time(), 0.0)


class ReplayClock(Clock):
    """The time of a replay. It starts with the first time that `reach` is called with.

    Args:
        speed: Seconds of the replay per real second; 0 for a stepwise clock.
    """

    def __init__(self, speed: float = 0.0) -> None:
        self.speed = speed
        self.stepwise = speed == 0
        self._reached = 0.0  # the latest time that `reach` was called with
        self._began: float | None = None  # the value of `time.monotonic` at which the replay's time was 0

    def now(self) -> float:
        if self._began is None:
            return self._reached
        return (time.monotonic() - self._began) * self.speed

    async def reach(self, at: float) -> None:
        if self.speed and self._began is None:
            self._began = time.monotonic() - at / self.speed
        await asyncio.sleep(self.seconds_until(at) or 0.0)
        self._reached = max(self._reached, at)

    def seconds_until(self, at: float) -> float | None:
        return max((at - self.now()) / self.speed, 0.0) if self.speed else None
