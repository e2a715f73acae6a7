"""Kills simulations, and reads their files."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers import environment_of_commands
from tests.patience import HANG

# Runs the command, and kills it at a given line of the log, or before or after a given file is renamed.
KILLED = """
import os, signal, sys
from pathlib import Path
from proactive.simulation.simulation_log import SimulationLog
from proactive.simulate import main

kind, number, *arguments = sys.argv[1:]
left = int(number)

def count(found):
    global left
    left -= found == kind
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

append, replace = SimulationLog._append, Path.replace

def appended(self, entry):
    append(self, entry)
    if kind == "line" and left == 1:
        self._file.write(b'{"key": "cut sh')  # the kill cuts the next line short
        self._file.flush()
    count("line")

def replaced(self, target):
    count("before")
    found = replace(self, target)
    count("after")
    return found

SimulationLog._append, Path.replace = appended, replaced
main(arguments)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the config. The lines of the log are sorted, because sessions are concurrent."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    first, *lines = found["log.jsonl"].splitlines(keepends=True)
    return found | {"log.jsonl": b"".join([first, *sorted(lines)])}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def killed(kind: str, number: int, *arguments: str, cwd: Path) -> None:
    """Start the command, and kill it at a line of its log ("line"), or "before" or "after" a file is renamed."""
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, kind, str(number), *arguments],
        cwd=cwd,
        env=environment_of_commands(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
