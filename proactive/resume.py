"""Which options a resumed run may change, and that it changes no others.

A checkpoint carries the options of its run. What may change is where and how fast steps are computed, where the run
ends, what is kept and shown of it, and, of the model and the data, what they name themselves in `may_change`; those
take effect from the first step on. Everything else is refused before any weights are loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.errors import UserError, refuse_changes
from models.learning.checkpoint_files import checkpoint_problem, load_run, refuse_damaged
from models.learning.training import BackboneModule

OPTIONS = "options"  # where a checkpoint has them
TRAINER_MAY_CHANGE = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "plugins", "benchmark"),  # where, and how fast
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time"),  # where it ends
    *("callbacks", "logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary"),  # what is shown
    *("profiler", "detect_anomaly", "deterministic"),
)
NEEDED = ("loops", "callbacks", "optimizer_states", "lr_schedulers")  # of what Lightning keeps
RUN_MAY_CHANGE = ("checkpoint_every_n_steps",)


class KeepOptions(Callback):
    """Puts the options of the run into each checkpoint."""

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
    """Compare the options given with those of a checkpoint's run.

    Args:
        path: The checkpoint.
        options: All options of the run that goes on, by group.
        kind: The class of the model.
        run_folder: The folder that the run goes on in; None if it begins a new one.

    Returns:
        The optimizer step that the checkpoint was written after.

    Raises:
        UserError: The checkpoint cannot be read, does not know its options, or an option differs that may not.
    """
    run_may_change = set(RUN_MAY_CHANGE)
    if run_folder is None:
        run_may_change |= {"root", "name"}
    elif run_folder.resolve().is_relative_to(Path(options["run"]["root"]).resolve()):
        run_may_change.add("root")  # the same folder in other words
    may_change = {
        "model": kind.may_change,
        "data": kind.data_class.may_change,
        "trainer": TRAINER_MAY_CHANGE,
        "run": run_may_change,
    }
    try:
        checkpoint = load_run(path, kind, checked=True, whole=False)  # is checked when weights are read
        if OPTIONS not in checkpoint:
            raise UserError(
                f"{path} does not say with which options it was trained: an earlier version wrote it",
                "Start a new run; what was trained can be evaluated and exported.",
            )
        if missing := [name for name in NEEDED if name not in checkpoint]:
            raise UserError(
                f"{path} lacks {', '.join(missing)}, without which no run goes on",
                "Start a new run; what was trained can be evaluated and exported.",
            )
        before = checkpoint[OPTIONS]
        seed_before, seed_now = ({"seed_everything": each["seed_everything"]} for each in (before, options))
        refuse_changes("", seed_before, seed_now, ())
        for group, names in may_change.items():
            refuse_changes(group, before[group], options[group], names)
    except UserError:
        refuse_damaged(path, checkpoint_problem(path))
        raise
    return int(checkpoint["global_step"])


def nothing_left(trainer: Trainer, step: int) -> str | None:
    """What to say of a resumed run that had nothing to train; None if it trained.

    Args:
        trainer: After its fit.
        step: The step that the run was resumed after.
    """
    if trainer.global_step > step:
        return None
    return (
        f"nothing was left to train after step {step}: trainer.max_epochs is {trainer.max_epochs}, trainer.max_steps "
        f"{trainer.max_steps}; raise what ended the run"
    )
