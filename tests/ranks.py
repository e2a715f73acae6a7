"""Several ranks on one machine: processes that find each other over gloo, forked from one that has imported all."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.patience import HANG

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_call, args=(rank, ranks, port, result, function, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + HANG
    try:
        while any(process.exitcode is None for process in processes):
            assert time.monotonic() < end, f"{function.__name__} on {ranks} ranks did not end"
            assert not any(process.exitcode for process in processes), "a rank failed; see its traceback"
            time.sleep(0.05)
        assert not any(process.exitcode for process in processes), "a rank failed; see its traceback"
    finally:
        for process in processes:
            process.kill()
    return torch.load(result, weights_only=True)


def _call(
    rank: int, ranks: int, port: int, result: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {  # as Lightning's launcher leaves them to its children
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PL_GLOBAL_SEED": "0",
        "RANKS_OF_TEST": str(ranks),  # WORLD_SIZE is gone after the first fit
    }
    returned = function(*arguments)
    if rank == 0:
        torch.save(returned, result)
