"""When a run saves checkpoints: the best weights, and the last step."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from callbacks.stopping import StopOnSignal
from datamodules.errors import UserError
from datamodules.files.writing import remove
from models.learning import sharded_files as shards
from models.learning.checkpoint_paths import BEST, LAST
from models.learning.training import BackboneModule
from models.networks.weight_files import naming_file

PREVIOUS = "previous.ckpt"


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every few optimizer steps, after each validation, at the end, and before a stop.

    Only the loss of the next step, or a validation, shows whether the weights after a step are finite. Until then the
    checkpoint before it is kept as `previous.ckpt`.

    Args:
        folder: Folder of `last.ckpt`.
        every_n_steps: Optimizer steps between saves.
        stop: Ends the run after a save; None for a run that no signal ends.
    """

    def __init__(self, folder: Path, every_n_steps: int = 50, stop: StopOnSignal | None = None) -> None:
        self.path = folder / LAST
        self.previous = folder / PREVIOUS
        self.every_n_steps = every_n_steps
        self.stop = stop
        self._saved = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            with naming_file(trainer.ckpt_path or ""):
                _refuse_other_progress(checkpoint["loops"], {"fit_loop": trainer.fit_loop.state_dict()}, "loops")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Metrics are logged at this step. Resumed from a validation within an epoch, Lightning's count is one too low.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.previous.exists():
            _refuse_not_finite(pl_module)
            self._drop_previous(trainer)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the end of the epoch follows, with its validation
        requested = self.stop is not None and self.stop.requested(trainer)
        # After a last step within an epoch, Lightning counts the epoch as done. A resume would skip the rest of it.
        if requested or trainer.global_step == trainer.max_steps or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        if self.stop is not None and requested:
            self.stop.end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._save(trainer)
            self._drop_previous(trainer)
            self._end_if_requested(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved < trainer.global_step:  # no validation followed the last step of the epoch
            self._save(trainer)
            self._end_if_requested(trainer)

    def _save(self, trainer: Trainer) -> None:
        _refuse_not_finite(trainer.lightning_module)  # before an older checkpoint is removed
        if trainer.is_global_zero and self.path.exists() and self._saved < trainer.global_step:
            remove(self.previous)
            with contextlib.suppress(OSError):  # a file system without links keeps the new checkpoint only
                shards.link(self.path, self.previous)
        trainer.save_checkpoint(self.path)
        self._saved = trainer.global_step

    def _drop_previous(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            remove(self.previous)

    def _end_if_requested(self, trainer: Trainer) -> None:
        if self.stop is not None:
            self.stop.end_if_requested(trainer)


def _refuse_not_finite(module: LightningModule) -> None:
    assert isinstance(module, BackboneModule)
    module.refuse_not_finite()


def _refuse_other_progress(saved: Any, own: Any, where: str) -> None:
    """Refuse a checkpoint whose loop counters differ in structure or type from those that Lightning keeps."""
    if isinstance(own, dict) and isinstance(saved, dict):
        for name, value in own.items():
            _refuse_other_progress(saved.get(name), value, f"{where}.{name}")
    elif type(saved) is not type(own) or (isinstance(saved, int) and saved < 0):
        raise UserError(
            f"the checkpoint does not say how far its run had come: field {where} is not valid",
            "Resume from another checkpoint, or start a new run.",
        )


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights with the best value of a metric in `best.ckpt`, also if the run folder moves before a resume.

    Args:
        folder: Folder of `best.ckpt`.
        monitor: The logged metric. Lower is better if its name ends in loss or error, else higher.
        resumable: Whether to save the optimizer's state too, so that a run can resume from it.
    """

    def __init__(self, folder: Path, monitor: str, resumable: bool = False) -> None:
        mode = "min" if monitor.endswith(("loss", "error")) else "max"
        # Saves at the end of validation, before `LastCheckpoint`, whose checkpoint then stores the best value.
        options: dict[str, Any] = {"save_on_train_epoch_end": False, "enable_version_counter": False}
        options["save_weights_only"] = not resumable
        super().__init__(folder, Path(BEST).stem, monitor=monitor, mode=mode, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath), BEST)
        score = state_dict.get("best_model_score")
        known = here.exists() and isinstance(score, torch.Tensor) and score.numel() == 1
        # Only the best value is taken from the checkpoint: Lightning deletes the files at the paths, and it drops the
        # value if the folder has another path.
        super().load_state_dict(
            {
                "dirpath": self.dirpath,
                "best_model_score": score if known else None,
                "best_model_path": str(here) if known else "",
                "kth_best_model_path": str(here) if known else "",
                "kth_value": score if known else self.kth_value,
                "best_k_models": {str(here): score} if known else {},
                "last_model_path": "",
            }
        )
