"""Signals end a run: at once, or after the current step."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.saving import LastCheckpoint
from callbacks.stopping import SIGNALS, Interrupted, StopOnSignal
from tests.models.small import small_classifier, small_data, small_trainer


@pytest.fixture(autouse=True)
def restore_handlers() -> Iterator[None]:
    """Lightning calls no teardown after an exception, so the handlers of an interrupted run stay."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Signal(Callback):
    """Sends this process SIGTERM some times before an optimizer step, or before a test batch."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        for _ in range(self.times):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_test_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_ends_the_run_within_the_step(root: Path, tmp_path: Path) -> None:
    stop = StopOnSignal()
    trainer = small_trainer(stop, Signal(times=2), LastCheckpoint(tmp_path, stop=stop), limit_val_batches=0)
    with pytest.raises(Interrupted) as ended:
        trainer.fit(small_classifier(), small_data(root))
    assert (ended.value.signal_number, ended.value.step) == (signal.SIGTERM, 0)
    assert not (tmp_path / "last.ckpt").exists()


def test_a_signal_ends_a_test_without_a_fit_at_once(root: Path) -> None:
    trainer = small_trainer(StopOnSignal(), Signal())
    with pytest.raises(Interrupted) as ended:
        trainer.test(small_classifier(), small_data(root), verbose=False)
    assert (ended.value.signal_number, ended.value.step) == (signal.SIGTERM, None)
