"""What a person sees while a run goes on."""

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar


def progress_callback(quiet: bool) -> Callback | None:
    """A bar on a terminal, a line an epoch elsewhere, nothing when quiet."""
    if quiet:
        return None
    return RichProgressBar(leave=True) if sys.stdout.isatty() else PlainProgress()


class PlainProgress(Callback):
    """One line for each epoch and each test, and one at least every `interval` seconds in between."""

    def __init__(self, interval: float = 30.0) -> None:
        self.interval = interval
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._last >= self.interval:
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            rate = trainer.callback_metrics.get("throughput/rows_per_second")
            speed = "" if rate is None else f", {float(rate):.1f} rows a second"
            self._print(trainer, f"{done} of {trainer.num_training_batches} steps{speed}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._print(trainer, _figures(trainer))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"testing on {sum(trainer.num_test_batches)} batches", flush=True)

    def _print(self, trainer: Trainer, text: str) -> None:
        self._last = time.monotonic()
        if trainer.is_global_zero:
            print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, step {trainer.global_step}: {text}",
                flush=True,
            )


def _figures(trainer: Trainer) -> str:
    shown = (
        "train/loss",
        "validation/loss",
        "validation/accuracy",
        "validation/f1",
        "validation/auroc",
        "validation/json_validity",
    )
    metrics = trainer.callback_metrics
    return ", ".join(f"{name} {float(metrics[name]):.4f}" for name in shown if name in metrics)
