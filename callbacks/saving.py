"""The checkpoints of a run: the best weights, the last step, and stopping with both in place."""

import contextlib
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from datamodules.errors import UserError
from datamodules.files.writing import remove
from models.learning import sharded_files as shards
from models.learning.checkpoint_files import BEST, LAST
from models.learning.training import BackboneModule
from models.networks.weight_files import naming

PREVIOUS = "previous.ckpt"


class Interrupted(BaseException):
    """The process was asked to stop, at some step or, if that is None, while it loaded; it has saved what it could."""

    def __init__(self, signal_number: int, step: int | None) -> None:
        super().__init__(signal_number, step)
        self.signal_number = signal_number
        self.step = step


def _refuse_not_finite(module: LightningModule) -> None:
    assert isinstance(module, BackboneModule)
    module.refuse_not_finite()


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every few optimizer steps, after each validation, at the end and when asked to stop.

    SIGTERM and SIGINT (Ctrl-C) end the run after the current step with a saved checkpoint; a second one, or one before
    the weights are loaded, ends it at once. Whether a step was good, only the loss of the next one or a validation can
    tell: until then the checkpoint before it is kept as `previous.ckpt`.

    Args:
        folder: Where `last.ckpt` is kept.
        every_n_steps: Optimizer steps between saves.
    """

    def __init__(self, folder: Path, every_n_steps: int = 50) -> None:
        self.path = folder / LAST
        self.previous = folder / PREVIOUS
        self.every_n_steps = every_n_steps
        self._saved = 0
        self._loaded = False
        self._signal = 0
        self._hosts: dist.ProcessGroup | None = None
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != self._note:
                self._handlers[number] = signal.signal(number, self._note)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            with naming(trainer.ckpt_path or ""):
                _refuse_other_progress(checkpoint["loops"], {"fit_loop": trainer.fit_loop.state_dict()}, "loops")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loaded = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):  # Lightning has put its own in their place since setup
            signal.signal(number, self._note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Where figures are logged; Lightning is one short after a checkpoint of a validation within an epoch.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.previous.exists():
            _refuse_not_finite(pl_module)
            self._drop_previous(trainer)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the epoch's end, with its validation, comes next
        asked = self._asked(trainer)
        # After a last step in the middle of an epoch Lightning counts the epoch as done: a resume would leave it out.
        if asked or trainer.global_step == trainer.max_steps or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        self._stop_if(asked, trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._save(trainer)
            self._drop_previous(trainer)
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved < trainer.global_step:  # no validation followed the epoch's last step
            self._save(trainer)
            self._stop_if_asked(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._stop_if_asked(trainer)

    def _save(self, trainer: Trainer) -> None:
        _refuse_not_finite(trainer.lightning_module)  # before anything makes room for it
        if trainer.is_global_zero and self.path.exists() and self._saved < trainer.global_step:
            remove(self.previous)
            with contextlib.suppress(OSError):  # where the file system has no links, the new one is all there is
                shards.link(self.path, self.previous)
        trainer.save_checkpoint(self.path)
        self._saved = trainer.global_step

    def _drop_previous(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            remove(self.previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal or not self._loaded:
            raise Interrupted(number, self._saved if self._loaded else None)
        self._signal = number

    def _asked(self, trainer: Trainer) -> int:
        """The signal that any rank was sent, or 0: ranks get it at different steps, and have to stop together."""
        if trainer.world_size == 1:
            return self._signal
        if self._hosts is None:
            self._hosts = dist.new_group(backend="gloo")
        asked = torch.tensor(self._signal)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._hosts)  # between hosts: no GPU is waited for
        return int(asked)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        self._stop_if(self._asked(trainer), trainer)

    @staticmethod
    def _stop_if(signal_number: int, trainer: Trainer) -> None:
        if signal_number:
            raise Interrupted(signal_number, trainer.global_step)


def _refuse_other_progress(saved: Any, own: Any, where: str) -> None:
    """Refuse what says how far a run has come, if it is not as Lightning keeps it."""
    if isinstance(own, dict) and isinstance(saved, dict):
        for name, value in own.items():
            _refuse_other_progress(saved.get(name), value, f"{where}.{name}")
    elif type(saved) is not type(own) or (isinstance(saved, int) and saved < 0):
        raise UserError(
            f"the checkpoint does not say how far its run had come: field {where} does not serve",
            "Resume from another checkpoint, or start a new run.",
        )


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights with the best figure in `best.ckpt`, also when the run folder was moved before a resume.

    Args:
        folder: Where `best.ckpt` is kept.
        monitor: The logged figure to judge by; one that ends in loss or error is best when least.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        mode = "min" if monitor.endswith(("loss", "error")) else "max"
        # At validation's end, before `LastCheckpoint` saves: so that a resumed run knows of it.
        options: dict[str, Any] = {"save_on_train_epoch_end": False, "enable_version_counter": False}
        super().__init__(folder, Path(BEST).stem, monitor=monitor, mode=mode, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath), BEST)
        score = state_dict.get("best_model_score")
        known = here.exists() and isinstance(score, torch.Tensor) and score.numel() == 1
        # Only the figure is a checkpoint's to say: Lightning removes what lies under the paths, and it forgets the
        # figure where the folder's path is another.
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
