"""Where trained weights are: in a run folder, a checkpoint or an export folder.

This module imports no torch, so that commands can refuse a wrong path before they import it.
"""

from pathlib import Path

from datamodules.errors import UserError
from datamodules.files.reading import require_regular_files
from datamodules.files.run_folders import CHECKPOINTS, holds_folds, runs_in
from datamodules.files.writing import recover

LAST = "last.ckpt"
BEST = "best.ckpt"
VALUES = "values.pt"  # of a sharded checkpoint, which is a folder
EXPORT_STATE = "proactive.json"  # of an export folder


def is_sharded(path: Path) -> bool:
    """Whether a path is a sharded checkpoint."""
    return (path / VALUES).is_file()


def holds_export(path: Path) -> bool:
    """Whether a path is a folder with the state of an export; its content is not read."""
    return (path / EXPORT_STATE).is_file()


def weights_path(target: Path, option: str) -> Path:
    """The export folder or the checkpoint with the weights that a path names.

    Args:
        target: A run folder (its best weights), a checkpoint, sharded or not, or an export folder.
        option: The option that `target` is the value of.

    Raises:
        UserError: There is none of them, or it contains something other than regular files.
    """
    if not holds_export(recover(target)):
        target = _checkpoint_of(target, option)
    require_regular_files(target, option)
    return target


def _checkpoint_of(target: Path, option: str) -> Path:
    """The path of a checkpoint: `target` itself, or the best checkpoint in the run folder `target`."""
    if (target / CHECKPOINTS).is_dir():
        names = (recover(target / CHECKPOINTS / name) for name in (BEST, LAST))
        target = next((path for path in names if path.exists()), target)
    if holds_folds(target):
        raise UserError(f"{option}: {target} holds a run for each fold", f"Give one of them: {runs_in(target)[0]}.")
    if not target.exists() or (target.is_dir() and not is_sharded(target)):
        raise UserError(
            f"{option}: {target} has no checkpoint" if target.exists() else f"{option}: there is no {target}",
            f"Give a run folder, a checkpoint, or an export folder (with {EXPORT_STATE}).",
        )
    return target
