"""Ends a run on SIGTERM or SIGINT."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal ended the run.

    Attributes:
        signal_number: The signal.
        step: The optimizer step at which the run ended; None if the weights were not loaded yet.
    """

    def __init__(self, signal_number: int, step: int | None) -> None:
        super().__init__(signal_number, step)
        self.signal_number = signal_number
        self.step = step


class StopOnSignal(Callback):
    """Ends a run when any rank receives SIGTERM or SIGINT (Ctrl-C).

    During training the run ends after the current step: `LastCheckpoint` calls `requested`, saves, and calls `end`. A
    second signal ends the run at once. So does a signal before the weights of a fit are loaded, and a signal during a
    test without a fit.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._loaded = False
        self._signal = 0
        self._host_group: dist.ProcessGroup | None = None
        self._previous_handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        for number in SIGNALS:
            if signal.getsignal(number) != self._note:
                self._previous_handlers[number] = signal.signal(number, self._note)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loaded = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in SIGNALS:  # Lightning has replaced the handlers since setup
            signal.signal(number, self._note)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.sanity_checking:
            self.end_if_requested(trainer)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.end_if_requested(trainer)

    def requested(self, trainer: Trainer) -> bool:
        """Whether any rank has received a signal. All ranks must call this together.

        Ranks receive a signal at different steps, and have to stop after the same one.
        """
        if trainer.world_size > 1:
            if self._host_group is None:
                self._host_group = dist.new_group(backend="gloo")
            received = torch.tensor(self._signal)
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self._host_group)  # gloo does not wait for GPUs
            self._signal = int(received)
        return self._signal != 0

    def end(self, trainer: Trainer) -> None:
        """End the run.

        Raises:
            Interrupted: Always.
        """
        raise Interrupted(self._signal, trainer.global_step)

    def end_if_requested(self, trainer: Trainer) -> None:
        """End the run if any rank has received a signal. All ranks must call this together.

        Raises:
            Interrupted: A rank has received a signal.
        """
        if self.requested(trainer):
            self.end(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal or not self._loaded:
            step = self._trainer.global_step if self._trainer and self._loaded else None
            raise Interrupted(number, step)
        self._signal = number
