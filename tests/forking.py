"""Processes that are forked from one that has imported the libraries, because imports take seconds.

Such a process has its own pid, streams, environment and working folder, gets signals, and ends like any other. But it
imports no library, so tests of imports need `python -m`.
"""

import contextlib
import functools
import gc
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import IO, Any

ROOT = Path(__file__).parents[1]
# What the processes need. No command, which would be found imported when it is run as a module.
PRELOADED = (
    *("bitsandbytes", "datasets", "peft", "sklearn.model_selection", "torch.utils.tensorboard"),
    *("transformers", "transformers.models.llama.modeling_llama"),
    *("callbacks.export_model", "models.judging.scorer", "proactive.fitting.cli", "proactive.tables", "tests.helpers"),
)


class Forked:
    """A process that calls a function, with the part of `subprocess.Popen` that tests use.

    Args:
        function: One of a module's.
        arguments: Its arguments.
        cwd: The working folder. It comes first on the path.
        env: The environment.
        stdout: PIPE, or an open file descriptor.
        stderr: The same, or STDOUT.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        cwd: Path,
        env: dict[str, str],
        stdout: int = PIPE,
        stderr: int = PIPE,
    ) -> None:
        self.returncode: int | None = None
        self.stdout, to_stdout = _stream(stdout)
        self.stderr, to_stderr = (None, os.dup(to_stdout)) if stderr == STDOUT else _stream(stderr)
        reports, to_reports = os.pipe()
        self._reports = os.fdopen(reports, "rb", buffering=0)  # unbuffered, so that select sees what is left
        with tempfile.TemporaryFile() as request:
            pickle.dump((str(cwd), env), request)
            pickle.dump((function, arguments), request)
            request.flush()
            request.seek(0)
            socket.send_fds(_server(), [b"."], [request.fileno(), to_reports, to_stdout, to_stderr])
        for descriptor in (to_reports, to_stdout, to_stderr):
            os.close(descriptor)
        self.pid = int(self._reports.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit code. It is negative after a signal."""
        if self.returncode is None:
            if not select.select([self._reports], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = int(self._reports.readline())
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both pipes until nobody holds them, and wait for the end."""
        end = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if end is None else max(end - time.monotonic(), 0.0)

        with ThreadPoolExecutor() as threads:
            reads = [threads.submit(stream.read) if stream else None for stream in (self.stdout, self.stderr)]
            try:
                out, err = ("" if read is None else read.result(left()) for read in reads)
            except TimeoutError:
                self.kill()  # which ends the other reads
                raise
        self.wait(left())
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _stream(kind: int) -> tuple[IO[str] | None, int]:
    """The end of a pipe that is read here, if it is one, and the descriptor for the process."""
    if kind != PIPE:
        return None, os.dup(kind)
    reader, writer = os.pipe()
    return os.fdopen(reader, encoding="utf-8"), writer


def run_module(module: str, arguments: list[str]) -> None:
    """Do what `python -m module` does."""
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@functools.cache
def _server() -> socket.socket:
    """Start the process that forks; it ends when this end of the socket is closed."""
    here, there = socket.socketpair()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with there:
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(there.fileno())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # OpenMP reads it once
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
        )
    server.returncode = 0  # nobody waits for it
    return here


def _serve(requests: socket.socket) -> None:
    """Fork for each request. This returns in forked processes only, when their function has returned."""
    while descriptors := socket.recv_fds(requests, 1, 4)[1]:
        if os.fork() == 0:
            requests.close()
            return _report(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    os._exit(0)


def _report(request: int, reports: int, stdout: int, stderr: int) -> None:
    """Fork once more, and report pid and exit code of the process that calls the function."""
    if pid := os.fork():
        for descriptor in (request, stdout, stderr):
            os.close(descriptor)
        os.write(reports, f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(reports, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    os.close(reports)
    for descriptor, standard in ((stdout, 1), (stderr, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    with os.fdopen(request, "rb") as file:
        folder, environment = pickle.load(file)
        os.chdir(folder)
        sys.path[0] = folder
        os.environ.clear()
        os.environ.update(environment)
        function, arguments = pickle.load(file)
    function(*arguments)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection would write to, and so copy, all pages
    _serve(socket.socket(fileno=int(sys.argv[1])))
