"""Checkpoints that survive a kill, refuse code, and let a run go on bit for bit.

`SafeCheckpointIO` writes beside the old file and renames, and loads weights and plain values only.
`LastCheckpoint` keeps `last.ckpt` current between optimizer steps, also when the process is asked to stop.
`SeedEachStep` makes the randomness of a step a function of its number, so that it needs no state.
"""

import os
import pickle
import signal
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from datamodules.errors import UserError

LAST = "last.ckpt"
BEST = "best.ckpt"


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The process was asked to stop, and has saved what it could."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(signal_number, step)
        self.signal_number = signal_number
        self.step = step


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load weights and plain values; nothing in the file can run code.

    Raises:
        UserError: There is no such file, it is damaged, or it holds more than weights and plain values.
    """
    problem = checkpoint_problem(path)
    if problem:
        others = [p for p in path.parent.glob("*.ckpt") if p != path and checkpoint_problem(p) is None]
        newest = max(others, key=lambda p: p.stat().st_mtime, default=None)
        hint = f"The newest good one is {newest}: give it as --ckpt_path or --checkpoint." if newest else ""
        raise UserError(f"{path}: {problem}", hint or "There is no good checkpoint beside it; start a new run.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, for it holds more than weights and plain values and could run code",
            "Use a checkpoint that this project wrote.",
        ) from error


def checkpoint_problem(path: Path) -> str | None:
    """What keeps a file from being a whole checkpoint, or None; reads it once and compares its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            return f"damaged in {damaged}" if damaged else None
    except FileNotFoundError:
        return "there is no such checkpoint"
    except (zipfile.BadZipFile, EOFError) as error:
        return f"truncated, damaged or no checkpoint ({error})"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


class SafeCheckpointIO(TorchCheckpointIO):
    """Atomic saves, loads with weights_only, and errors that say what to do."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            raise UserError(
                f"cannot save {target}: {error.strerror or error}",
                "Make room there; the previous checkpoint is intact.",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every few optimizer steps, after each validation and when asked to stop.

    SIGTERM and SIGINT (Ctrl-C) end the run at the next optimizer step with a saved checkpoint; a second one
    ends it at once. Lightning's own callback may save between two micro-batches of a step after a resume,
    with the accumulated gradients lost; this one never does.

    Args:
        folder: Where `last.ckpt` is kept.
        every_n_steps: Optimizer steps between saves.
    """

    def __init__(self, folder: Path, every_n_steps: int = 50) -> None:
        self.path = folder / LAST
        self.every_n_steps = every_n_steps
        self._step = 0
        self._signal = 0
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != self._note:
                self._handlers[number] = signal.signal(number, self._note)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):  # Lightning has put its own in their place since setup
            signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of a step
        self._step = trainer.global_step
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # validation comes next, and saves after it
        if self._signal or self._step % self.every_n_steps == 0:
            trainer.save_checkpoint(self.path)
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._signal and trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            trainer.save_checkpoint(self.path)
            self._stop_if_asked(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._stop_if_asked(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            raise Interrupted(number, self._step)
        self._signal = number

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._signal:
            raise Interrupted(self._signal, trainer.global_step)


class SeedEachStep(Callback):
    """Seeds dropout and the like before each micro-batch from the run's seed, the epoch, its place and the rank."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        run_seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        seed = 0
        for part in (run_seed, trainer.current_epoch, batch_idx, trainer.global_rank):
            seed = (seed * 6_364_136_223_846_793_005 + part + 1_442_695_040_888_963_407) % 2**63  # Knuth's MMIX
        torch.manual_seed(seed)
