"""Progress of a run: a bar in a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar

from datamodules.escaping import printable
from models.learning.run_length import total_steps


def progress_callback(quiet: bool) -> Callback | None:
    """A bar in a terminal, lines elsewhere, None if quiet."""
    if quiet:
        return None
    return TerminalProgress(leave=True) if sys.stdout.isatty() else PlainProgress()


class TerminalProgress(RichProgressBar):
    """A bar for each epoch, as long as the epoch or as max_steps allows.

    Args:
        interval: Seconds between updates of the loss. Reading it waits for the device.
        options: Options of `RichProgressBar`.
    """

    def __init__(self, interval: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        self.interval = interval
        self._next = 0.0
        self._loss: dict[str, float] = {}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics that the bar shows."""
        if trainer.training and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.interval
            self._loss = {n: float(v) for n, v in trainer.callback_metrics.items() if n == "train/loss"}
        return {**self._loss, **super().get_metrics(trainer, pl_module)}

    @property
    def total_train_batches(self) -> int | float:
        trainer = self.trainer
        batches, done = super().total_train_batches, trainer.fit_loop.epoch_loop.batch_progress.current.completed
        left = trainer.max_steps - trainer.global_step if trainer.max_steps >= 0 else batches
        return min(batches, done + left)


class PlainProgress(Callback):
    """Prints a line after each epoch, before each test, and every `interval` seconds of training.

    A line of training shows the steps done and in total, steps per second, and the time left. The rate includes
    validations and all other time since the start of training.

    Args:
        interval: Seconds between lines within an epoch.
    """

    def __init__(self, interval: float = 30.0) -> None:
        self.interval = interval
        self._last = self._start = time.monotonic()
        self._first = 0  # the step that the run resumed from

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = self._start = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._last >= self.interval:
            self._print(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._print(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"testing on {sum(trainer.num_test_batches)} batches", flush=True)

    def _print(self, trainer: Trainer) -> None:
        self._last = time.monotonic()
        if not trainer.is_global_zero:
            return
        step, total = trainer.global_step, total_steps(trainer)
        epochs = -(-total // int(trainer.num_training_batches))
        parts = [_metrics(trainer), _pace(step - self._first, total - step, self._last - self._start, "steps ")]
        print(
            f"epoch {trainer.current_epoch + 1}/{epochs}, step {step} of {total}: {', '.join(filter(None, parts))}",
            flush=True,
        )


def _pace(done: int, left: int, seconds: float, what: str = "") -> str:
    """The rate, and the time left at this rate; empty before the first one."""
    rate = done / max(seconds, 1e-9)
    return f"{rate:.2g} {what}a second, {timedelta(seconds=round(left / rate))} left" if rate else ""


def _metrics(trainer: Trainer) -> str:
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
    """Show the progress of a loop with its rate and the time left: a bar in a terminal, lines elsewhere.

    Args:
        label: Text before the count.
        total: Number of iterations.
        quiet: Show nothing.
        interval: Seconds between lines.

    Yields:
        A function to call after each iteration.
    """
    label = printable(label)
    if quiet or not total:
        yield lambda: None
    elif sys.stdout.isatty():
        with _bar() as progress:
            task = progress.add_task(label, total=total)
            yield lambda: progress.advance(task)
    else:
        yield _Lines(label, total, interval)


class _Lines:
    """Prints a line every `interval` seconds and one at the end."""

    def __init__(self, label: str, total: int, interval: float) -> None:
        self.label, self.total, self.interval = label, total, interval
        self.done = 0
        self.start = self.last = time.monotonic()

    def __call__(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last >= self.interval or self.done == self.total:
            self.last = now
            pace = _pace(self.done, self.total - self.done, now - self.start)
            print(f"{self.label}: {self.done} of {self.total}, {pace}", flush=True)


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
