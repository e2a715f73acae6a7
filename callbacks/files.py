"""Run folders, and writing a file so that it is there whole or not at all."""

import os
import tempfile
from pathlib import Path

from datamodules.errors import UserError

CHECKPOINTS = "checkpoints"
LOGS = "logs"
EXPORT = "export"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
RUN_FOLDER_VARIABLE = "PROACTIVE_RUN_FOLDER"  # by it the processes that rank 0 starts know their run's folder


def new_run_folder(root: Path, name: str) -> Path:
    """Make and return `root/name/n` for the smallest n that comes after every other one."""
    parent = root / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / str(max((number(path) for path in parent.iterdir()), default=-1) + 1)
            try:
                folder.mkdir()
            except FileExistsError:  # another run took it in this moment
                continue
            return folder
    except OSError as error:
        raise UserError(
            f"cannot make a run folder in {parent}: {error.strerror}", "Choose another place with --run.root."
        ) from error


def latest_run_folder(root: Path, name: str) -> Path:
    """The run folder with the greatest number.

    Raises:
        UserError: There is none.
    """
    parent = root / name
    runs = [path for path in parent.iterdir() if number(path) >= 0] if parent.is_dir() else []
    if not runs:
        raise UserError(f"--ckpt_path last: there is no run in {parent}", "Start one without --ckpt_path.")
    return max(runs, key=number)


def number(path: Path) -> int:
    """The number that a run folder is named by; -1 if it is none."""
    return int(path.name) if path.name.isdecimal() else -1


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file under another name in the same folder, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
