"""The ranks of a job agree on one run folder: rank 0 chooses it, the others learn it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from datamodules.files.run_folders import agreed_folder, new_run_folder

FOLDER_VARIABLE = "PROACTIVE_RUN_FOLDER"


def folder_from_rank_0() -> Path | None:
    """The run folder, in a process that rank 0 started; else None."""
    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(folder) if folder else None


@contextlib.contextmanager
def folder_for_children(folder: Path) -> Iterator[None]:
    """Processes that start within this context take `folder` as their run folder."""
    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[FOLDER_VARIABLE]
        else:
            os.environ[FOLDER_VARIABLE] = before


def is_rank_0() -> bool:
    """Whether this process is rank 0 of those that torchrun or SLURM started, or the only process."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def leads_job() -> bool:
    """Whether this process is rank 0, and rank 0 did not start it."""
    return folder_from_rank_0() is None and is_rank_0()


def choose_folder(root: Path, name: str, resumed: Path | None) -> Path:
    """The run folder, which is the same on all ranks.

    Args:
        root: Folder of all runs.
        name: Name of the run.
        resumed: The run folder to continue in; None for a new one, `root/name/n`.
    """
    if (given := folder_from_rank_0()) is not None:
        return given
    return resumed or agreed_folder(root / name, lambda: new_run_folder(root, name))
