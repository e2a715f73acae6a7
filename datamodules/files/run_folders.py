"""Run folders: their names, their numbers and their locks."""

import contextlib
import errno
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path

from datamodules.errors import UserError
from datamodules.files.writing import remove_leftovers, write_atomically

CHECKPOINTS = "checkpoints"
LOGS = "logs"
EXPORT = "export"
CONFIG_FILE = "config.yaml"
FOLDS_FILE = "folds.yaml"
FOLD_PLACEHOLDER = "{fold}"  # in the value of an option, the number of the fold takes its place
METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
DECISIONS_FILE = "decisions.jsonl"
ANSWERS_FILE = "answers.jsonl"  # of an evaluation of an agent, as the next one
VERDICTS_FILE = "verdicts.jsonl"
LOCK = ".lock"
RANKS_TIMEOUT = 120  # seconds: maximum time between the starts of a job's first and last rank


def new_run_folder(root: Path, name: str) -> Path:
    """Make and return `root/name/n`, where n is the greatest number there plus one."""
    parent = root / name
    try:
        while True:
            parent.mkdir(parents=True, exist_ok=True)
            folder = parent / str(max((number(path) for path in parent.iterdir()), default=-1) + 1)
            try:
                folder.mkdir()
            except (FileExistsError, FileNotFoundError):  # another run took it or removed the parent at this moment
                continue
            return folder
    except OSError as error:
        raise UserError(
            f"cannot make a run folder in {parent}: {error.strerror}", "Choose another place with --run.root."
        ) from error


def output_folder(output: Path | None, name: str, log: str) -> Path:
    """Return the output folder of a command that can continue in its own folder.

    Args:
        output: The folder of --output: a new one, an empty one, or one of this command. If None, a new folder in
            `runs/name` is made.
        name: The command.
        log: Name of the file that each folder of the command contains.

    Raises:
        UserError: The path is a file, or a folder with other contents.
    """
    if output is None:
        return new_run_folder(Path("runs"), name)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file", "Give the path of a folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / log).exists():
        raise UserError(f"--output: {output} holds other things than `{name}` wrote", "Give the path of a new folder.")
    return output


def holds_folds(folder: Path) -> bool:
    """Return whether a folder is that of a cross-validation: it holds a folder for each fold."""
    return (folder / FOLDS_FILE).is_file()


def runs_in(folder: Path) -> list[Path]:
    """Return the newest run of each fold of a cross-validation; any other folder, or one without runs, as it is."""
    if not holds_folds(folder):
        return [folder]
    numbers = (path.name.removeprefix("fold-") for path in folder.glob("fold-*/"))
    folds = sorted(int(number) for number in numbers if number.isdecimal())
    return [latest_run_folder(folder, f"fold-{fold}") for fold in folds] or [folder]


def missing_folders(folder: Path) -> list[Path]:
    """Return those of a folder and its parents that do not exist, the innermost first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders in order, up to the first that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


class EmptyFolderGuard:
    """Removes a run folder that holds nothing but its lock when this process ends, even if it is killed.

    A run takes its number by making its folder, so runs that start at the same time get different numbers. Nothing is
    written there before the weights are loaded. If the process is killed before, it cannot remove the folder itself, so
    a helper process waits for its end.

    Args:
        folders: The run folder, and the parents to remove if they are empty then, the innermost first.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        script = f"""cat > /dev/null
            [ "$(ls -A "$1")" != {LOCK} ] || rm "$1/{LOCK}"
            for folder; do rmdir "$folder" 2> /dev/null || exit; done"""
        self._waiting = subprocess.Popen(  # noqa: S603 - the command is ours; the folders are arguments of it
            ["/bin/sh", "-c", script, "sh", *(str(folder.absolute()) for folder in folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C signals all processes of a session
        )

    def end(self) -> None:
        """Remove the folders if they hold nothing but a lock, and end the helper process."""
        assert self._waiting.stdin is not None
        self._waiting.stdin.close()
        self._waiting.wait()


def agreed_folder(parent: Path, choose: Callable[[], Path]) -> Path:
    """Return the folder that rank 0 chooses, on every rank of a job that torchrun or SLURM has started.

    Ranks need it before they are connected. They exchange it through torchrun's store, or through a file that is named
    after the SLURM job. Other processes choose for themselves.

    Raises:
        UserError: The file of rank 0 does not appear within `RANKS_TIMEOUT` seconds.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        from torch.distributed import TCPStore

        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=RANKS_TIMEOUT))
        key = f"proactive/run_folder/{environment['TORCHELASTIC_RESTART_COUNT']}"
        if environment["RANK"] == "0":
            store.set(key, str(choose()))
        return Path(store.get(key).decode())
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        note = parent / f".slurm-{'-'.join(environment.get(name, '0') for name in names)}"
        if environment["SLURM_PROCID"] == "0":
            write_atomically(note, str(choose()))
        end = time.monotonic() + RANKS_TIMEOUT
        while not note.is_file():
            if time.monotonic() > end:
                raise UserError(
                    f"rank 0 has not written {note}", "Put --run.root on a file system that all nodes share."
                )
            time.sleep(0.2)
        return Path(note.read_text(encoding="utf-8"))
    return choose()


def latest_run_folder(root: Path, name: str) -> Path:
    """Return the run folder with the greatest number.

    Raises:
        UserError: There is none.
    """
    parent = root / name
    runs = [path for path in parent.iterdir() if number(path) >= 0] if parent.is_dir() else []
    if not runs:
        raise UserError(f"--ckpt_path last: there is no run in {parent}", "Start one without --ckpt_path.")
    return max(runs, key=number)


def number(path: Path) -> int:
    """Return the number of a run folder; -1 if its name is no number."""
    return int(path.name) if path.name.isdecimal() else -1


class RunLock:
    """Locks a run folder for this process and the others of its job, until this process ends, even if it is killed.

    Args:
        folder: The run folder.

    Raises:
        UserError: Another process has locked it.
    """

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._file = os.fdopen(descriptor, "w")
        try:
            # A lock of the process, not of the open file: workers that outlive a killed process do not keep it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{folder / LOCK}: {error.strerror}", "Put --run.root on a file system with file locks."
                ) from error
            raise UserError(
                f"{folder} is in use: another process is training there",
                "Wait until it ends, or start a new run without --ckpt_path.",
            ) from error
        for locked in (folder, folder / CHECKPOINTS):
            remove_leftovers(locked)
