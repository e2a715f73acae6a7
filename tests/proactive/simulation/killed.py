"""Kills simulations, and reads their files."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.forking import Forked
from tests.helpers import environment_of_commands
from tests.patience import HANG


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
    process = Forked(_run_until, kind, number, arguments, cwd=cwd, env=environment_of_commands())
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == -signal.SIGKILL, err


def _run_until(kind: str, number: int, arguments: tuple[str, ...]) -> None:
    """Run the command in this process until it is killed."""
    from proactive.simulate import main
    from proactive.simulation.simulation_log import SimulationLog

    append, replace, left = SimulationLog._append, Path.replace, number

    def count(found: str) -> None:
        nonlocal left
        left -= found == kind
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def appended(self: Any, entry: Any) -> None:
        append(self, entry)
        if kind == "line" and left == 1:
            self._file.write(b'{"key": "cut sh')  # the kill cuts the next line short
            self._file.flush()
        count("line")

    def replaced(self: Path, target: Path) -> Path:
        count("before")
        found = replace(self, target)
        count("after")
        return found

    SimulationLog._append, Path.replace = appended, replaced  # type: ignore[method-assign]
    main(list(arguments))
