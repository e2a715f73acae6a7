"""Several ranks on one machine: processes that find each other over gloo."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.forking import Forked
from tests.patience import HANG

STDERR = 2


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment_of(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What Lightning's launcher leaves to its children."""
    return {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PL_GLOBAL_SEED": "0",
    }


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> Any:
    """Call a function in each of some processes, and give what it returned on rank 0.

    Args:
        ranks: How many processes.
        function: One of a module's; what it returns is made of tensors and plain values.
        arguments: Its arguments.
        folder: Where to put what it returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"{function.__name__}-{ranks}.pt"
    port = free_port()
    ranks_of_test = {"RANKS_OF_TEST": str(ranks)}  # WORLD_SIZE is gone after the first fit
    processes = [
        Forked(
            _call,
            *(rank, result, function, arguments),
            cwd=Path.cwd(),
            env={**os.environ, **environment_of(rank, ranks, port), **ranks_of_test},
            stdout=STDERR,
            stderr=STDERR,
        )
        for rank in range(ranks)
    ]
    end = time.monotonic() + HANG
    try:
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < end, f"{function.__name__} on {ranks} ranks did not end"
            assert not any(process.returncode for process in processes), "a rank failed; see its traceback"
            time.sleep(0.05)
        assert not any(process.returncode for process in processes), "a rank failed; see its traceback"
    finally:
        for process in processes:
            process.kill()
    return torch.load(result, weights_only=True)


def _call(rank: int, result: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    returned = function(*arguments)
    if rank == 0:
        torch.save(returned, result)
