"""Several ranks on one machine: processes that find each other over gloo."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from tests.forking import Forked, run_module
from tests.helpers import environment_of_commands
from tests.patience import HANG

STDERR = 2


def command_on_ranks(ranks: int, module: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a module as a command on each rank, as torchrun starts them, and return how rank 0 ended."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    line = list(map(str, arguments))
    processes = [
        Forked(
            *(run_module, module, line),
            cwd=cwd,
            env={**environment_of_commands(), **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    (out, err), *_ = [process.communicate(timeout=HANG) for process in processes]
    assert not any(process.returncode for process in processes[1:]), "a rank failed"
    return subprocess.CompletedProcess([module, *line], processes[0].wait(), out, err)


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
    environment = {  # as Lightning's launcher leaves it to its children
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PL_GLOBAL_SEED": "0",
        "RANKS_OF_TEST": str(ranks),  # WORLD_SIZE is gone after the first fit
    }
    processes = [
        Forked(
            _call,
            *(rank, result, function, arguments),
            cwd=Path.cwd(),
            env={**os.environ, **environment, "LOCAL_RANK": str(rank)},
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
