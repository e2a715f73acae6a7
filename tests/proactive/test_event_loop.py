"""A signal ends a command's coroutine in order, wherever it arrives."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from proactive.event_loop import SIGNALS, SignalReceivedError, run_until_signal


async def many_tasks(cleaned: list[int]) -> None:
    """Tasks that each do a little, so that a signal arrives at any place of the loop."""

    async def one(number: int) -> None:
        try:
            while True:
                await asyncio.sleep(0)
        finally:
            cleaned.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(one(number))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("delay", [0.05, 0.0507, 0.0519, 0.0531])
def test_a_signal_cancels_all_tasks(number: int, delay: float) -> None:
    cleaned: list[int] = []
    handlers = {one: signal.getsignal(one) for one in (*SIGNALS, signal.SIGALRM)}
    sender = subprocess.Popen(["sh", "-c", f"sleep {delay}; kill -{number} {os.getpid()}"])
    with pytest.raises(SignalReceivedError) as stop:
        run_until_signal(many_tasks(cleaned))
    sender.wait()
    assert (stop.value.number, stop.value.code) == (number, 128 + number)
    assert sorted(cleaned) == [0, 1, 2, 3, 4]
    assert {one: signal.getsignal(one) for one in handlers} == handlers


def test_a_signal_ends_a_computation_that_blocks_the_loop() -> None:
    reached: list[float] = []

    async def compute() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            reached[:] = [end - time.monotonic()]

    with pytest.raises(SignalReceivedError):
        run_until_signal(compute())
    assert reached[0] > 0


def test_a_second_signal_ends_a_cleanup_that_hangs() -> None:
    async def stubborn() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    with pytest.raises(SignalReceivedError) as stop:
        run_until_signal(stubborn())
    assert stop.value.number == signal.SIGTERM


def test_without_a_signal_results_and_errors_pass() -> None:
    async def result() -> int:
        return 3

    async def error() -> None:
        raise ValueError("no")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    assert run_until_signal(result()) == 3
    with pytest.raises(ValueError, match="no"):
        run_until_signal(error())
    with pytest.raises(asyncio.CancelledError):
        run_until_signal(cancelled())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_exits_with_the_shells_code(number: int) -> None:
    code = "import asyncio; from proactive.event_loop import run_until_signal\n"
    code += "async def wait():\n    print('waits', flush=True)\n    await asyncio.sleep(60)\nrun_until_signal(wait())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waits\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, b"")
