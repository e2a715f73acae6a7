"""Resuming a run: which checkpoint, and which options may change.

A checkpoint stores the options of its run. A resume may change where and how fast steps are computed, when the run
ends, what it logs and shows, and the options that the model and the data list in `may_change`. These changes take
effect from the first step on. All other changes are refused before weights are loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.errors import UserError, refuse_changes
from datamodules.files.run_folders import CHECKPOINTS, CONFIG_FILE, holds_folds, latest_run_folder
from datamodules.files.writing import recover
from models.learning.checkpoint_files import checkpoint_problem, load_run, refuse_damaged
from models.learning.checkpoint_paths import LAST, is_sharded
from models.learning.training import BackboneModule
from proactive.fitting.trainer_options import REFUSED
from proactive.terminal import say

OPTIONS = "options"  # key of the options in a checkpoint
TRAINER_MAY_CHANGE = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "plugins", "benchmark"),  # where, and how fast
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time"),  # when the run ends
    *("callbacks", "logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary"),  # what it shows
    *("profiler", "detect_anomaly", "deterministic"),
    *REFUSED,  # they have one value only; checkpoints of earlier versions list it
)
NEEDED = ("loops", "callbacks", "optimizer_states", "lr_schedulers")  # Lightning's keys that a resume needs
RUN_MAY_CHANGE = ("checkpoint_every_n_steps", "tracker", "resumable_best", "export_dtype")
ONLY_NEW_RUN = "Start a new run. The checkpoint can still be evaluated and exported."


def resumed_folder(root: str, name: str, ckpt_path: str | None) -> Path | None:
    """The run folder that contains `ckpt_path`, or the folder of a cross-validation that it is.

    None without a resume, or if no run folder contains the checkpoint.

    Args:
        root: Folder of all runs.
        name: Name of the run.
        ckpt_path: A checkpoint, "last", or None.

    Raises:
        UserError: There is no such checkpoint, or no run.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        return latest_run_folder(Path(root), name)
    if holds_folds(Path(ckpt_path)):
        return Path(ckpt_path)
    path = recover(Path(ckpt_path))
    if not path.is_file() and not is_sharded(path):
        last = path / CHECKPOINTS / LAST
        given = str(last) if last.exists() else "a checkpoint, the folder of a cross-validation, or last"
        raise UserError(f"--ckpt_path: there is no checkpoint {path}", f"Give {given}.")
    folder = path.parent.parent
    return folder if (folder / CONFIG_FILE).is_file() else None


def checkpoint_to_resume(ckpt_path: str | None, folder: Path | None) -> str | None:
    """Replace "last" by the last checkpoint of the run folder; None if there is none yet.

    Args:
        ckpt_path: A checkpoint, "last", or None.
        folder: The run folder, from `resumed_folder`.
    """
    if ckpt_path != "last" or folder is None:
        return ckpt_path
    path = recover(folder / CHECKPOINTS / LAST)
    if not path.exists():
        say(f"{folder} stopped before its first checkpoint, so it starts from the beginning")
        return None
    return str(path)


class KeepOptions(Callback):
    """Stores the options of the run in each checkpoint."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[OPTIONS] = self.options


def refuse_other_options(
    path: Path,
    options: Mapping[str, Any],
    kind: type[BackboneModule],
    run_folder: Path | None,
) -> int:
    """Compare the given options with those in a checkpoint.

    Args:
        path: The checkpoint.
        options: All options of the resumed run, by group.
        kind: The class of the model.
        run_folder: The folder that the run continues in; None for a new folder.

    Returns:
        The optimizer step of the checkpoint.

    Raises:
        UserError: The checkpoint cannot be read or contains no options, or an option differs that may not change.
    """
    try:
        checkpoint = load_run(path, kind, checked=True, whole=False)  # its checksums are verified with the weights
        if not checkpoint.get("optimizer_states"):
            last = path.with_name(LAST)
            raise UserError(
                f"{path} contains weights alone, and a resume needs the optimizer's state",
                f"Resume from {last}." if last.exists() and last != path else ONLY_NEW_RUN,
            )
        if OPTIONS not in checkpoint:
            raise UserError(
                f"{path} does not contain the options of its run, because an earlier version wrote it", ONLY_NEW_RUN
            )
        if missing := [name for name in NEEDED if name not in checkpoint]:
            raise UserError(f"{path} lacks {', '.join(missing)}, which a resume needs", ONLY_NEW_RUN)
        refuse_changed_options(checkpoint[OPTIONS], options, kind, run_folder)
    except UserError:
        refuse_damaged(path, checkpoint_problem(path))
        raise
    return int(checkpoint["global_step"])


def refuse_changed_options(
    before: Mapping[str, Any], options: Mapping[str, Any], kind: type[BackboneModule], run_folder: Path | None
) -> None:
    """Compare options with those that a run began with; see `refuse_other_options` for arguments.

    Raises:
        UserError: An option differs that may not change.
    """
    run_may_change = set(RUN_MAY_CHANGE)
    if run_folder is None:
        run_may_change |= {"root", "name"}
    elif run_folder.resolve().is_relative_to(Path(options["run"]["root"]).resolve()):
        run_may_change.add("root")  # another spelling of the same folder
    may_change = {
        "model": kind.may_change,
        "data": kind.data_class.may_change,
        "trainer": TRAINER_MAY_CHANGE,
        "run": run_may_change,
    }
    seed_before, seed_now = ({"seed_everything": each["seed_everything"]} for each in (before, options))
    refuse_changes("", seed_before, seed_now, ())
    for group, names in may_change.items():
        refuse_changes(group, before[group], options[group], names)


def nothing_left(trainer: Trainer, step: int) -> str | None:
    """A message if the resumed run had nothing to train; else None.

    Args:
        trainer: The trainer after its fit.
        step: Optimizer step of the checkpoint that the run resumed from.
    """
    if trainer.global_step > step:
        return None
    return (
        f"nothing was left to train after step {step}: trainer.max_epochs is {trainer.max_epochs}, trainer.max_steps "
        f"{trainer.max_steps}; increase the one that ended the run"
    )
