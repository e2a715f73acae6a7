"""What the tests of the commands share: one small finished run, and commands called in this process."""

import fcntl
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from proactive.terminal import run
from tests.helpers import SMALL_RUN, python_m, small_root

LOGGERS = ("proactive", "lightning", "lightning.pytorch", "lightning.fabric", "bitsandbytes")
Main = Callable[[list[str]], None]


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said."""

    code: Any
    out: str
    err: str


@dataclass(frozen=True)
class FinishedRun:
    """A run of `SMALL_RUN` on a small root, started in `place`."""

    place: Path
    root: Path
    folder: Path
    out: str
    err: str


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One run that nothing disturbs: what it leaves behind is looked at, and others are compared with it.

    The first worker that needs it makes it, for all of them.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    place = shared / "finished_run"
    place.mkdir(exist_ok=True)
    folder, root, said = place / "runs" / "reward" / "0", place / "root", place / "said.json"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            small_root(root)
            ended = python_m("proactive.fit", *SMALL_RUN, f"--data.root={root}", cwd=place)
            said.write_text(json.dumps([ended.returncode, ended.stdout, ended.stderr]), encoding="utf-8")
    code, out, err = json.loads(said.read_text(encoding="utf-8"))
    assert code == 0, err
    return FinishedRun(place, root, folder, out, err)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable]:
    """Calls a command as its process would, but in this one, which saves the seconds that a process starts in.

    The working directory is an empty folder; what a command changes in this process is put back afterwards.
    """
    monkeypatch.chdir(tmp_path)
    environment, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes that these tests start
    os.environ["HF_HUB_OFFLINE"] = "1"
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]

    def call_here(main: Main, *arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            run(main)
        return Ended(ended.value.code, *capsys.readouterr())

    yield call_here
    torch.set_num_threads(threads)
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)
