"""What a person sees while a run goes on."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def counted(label: str, total: int, quiet: bool = False, interval: float = 30.0) -> Iterator[Callable[[], None]]:
    """Show how far a count has come: a bar with rate and time left on a terminal, lines elsewhere.

    Args:
        label: What is done, as plain text.
        total: How many there are.
        quiet: Show nothing.
        interval: Seconds between lines.

    Yields:
        What counts one more.
    """
    if quiet or not total:
        yield lambda: None
    elif sys.stdout.isatty():
        with _bar() as progress:
            task = progress.add_task(label, total=total)
            yield lambda: progress.advance(task)
    else:
        yield _Lines(label, total, interval)


class _Lines:
    """A line every few seconds and one at the end."""

    def __init__(self, label: str, total: int, interval: float) -> None:
        self.label, self.total, self.interval = label, total, interval
        self.done = 0
        self.start = self.last = time.monotonic()

    def __call__(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last >= self.interval or self.done == self.total:
            self.last = now
            rate = self.done / max(now - self.start, 1e-9)
            left = (self.total - self.done) / rate
            print(f"{self.label}: {self.done} of {self.total}, {rate:.1f} a second, {left:.0f} s left", flush=True)


def _bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.1f} a second" if task.speed else "")

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
