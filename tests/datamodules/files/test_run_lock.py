"""A run folder is one job's at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.files.run_folders import RunLock
from tests.helpers import ROOT
from tests.patience import HANG

HOLDS = """
import os, signal, sys, time
from pathlib import Path
from datamodules.files.run_folders import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:  # as a worker that prepares batches, which may outlive its parent
    time.sleep(float(sys.argv[2]))
    os._exit(0)
print("held", flush=True)
signal.pause()
"""
TRIES = """
import sys
from pathlib import Path
from datamodules.files.run_folders import RunLock
from datamodules.errors import UserError
try:
    RunLock(Path(sys.argv[1]))
    print("free")
except UserError as error:
    print(error.what)
"""


def test_a_run_folder_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    """Also where the process is killed, and leaves workers behind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def tried() -> str:
        command = [sys.executable, "-c", TRIES, tmp_path]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG).stdout.strip()

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.ckpt.a.unfinished").touch()
    command = [sys.executable, "-c", HOLDS, tmp_path, str(HANG)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert not list((tmp_path / "checkpoints").iterdir()), "what a killed process left behind"
            assert tried() == f"{tmp_path} is in use: another process is training there"
            holder.kill()
            holder.wait()
            assert tried() == "free"
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_link_at_the_path_of_the_lock_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        RunLock(tmp_path)
    assert not (tmp_path / "victim").exists()
