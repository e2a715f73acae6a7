"""LastCheckpoint and StopOnSignal: when a run saves, and how a signal ends it."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from callbacks.checkpoint_io import SafeCheckpointIO
from callbacks.saving import BestCheckpoint, LastCheckpoint
from callbacks.stopping import Interrupted, StopOnSignal
from models.learning.checkpoint_files import load_checkpoint
from tests.helpers import SignalAtStep
from tests.models.small import fit, small_classifier, small_data


class Saves(SafeCheckpointIO):
    """Records the optimizer step and the micro-batch after which each checkpoint is saved."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        self.places.append((checkpoint["global_step"], progress["current"]["ready"]))
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.fixture
def handlers() -> Iterator[dict[int, Any]]:
    """The handlers of SIGTERM and SIGINT, restored after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 3}], ids=["whole epochs", "validation mid-step"])
def test_last_is_saved_every_few_steps_and_at_the_end(root: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """A step has four micro-batches, which the loader returns together."""
    saves, data = Saves(), small_data(root)
    fit(small_classifier(), data, LastCheckpoint(tmp_path, 2), plugins=[saves], **options)
    batches = len(data.train_dataloader())
    assert saves.places[-1] == (batches, batches), "the end of the epoch"
    assert {step for step, _ in saves.places} >= {2, 4}
    for step, batch in saves.places:
        assert batch == step
    assert not (tmp_path / "previous.ckpt").exists(), "kept until the next step was good, and no longer"


@pytest.mark.parametrize("resumable", [False, True])
def test_best_has_the_state_of_the_optimizer_if_asked(root: Path, tmp_path: Path, resumable: bool) -> None:
    best = BestCheckpoint(tmp_path, "validation/loss", resumable)
    fit(small_classifier(), small_data(root), best, enable_checkpointing=True)
    checkpoint = load_checkpoint(tmp_path / "best.ckpt")
    assert checkpoint["state_dict"]
    assert ("optimizer_states" in checkpoint) == resumable


def test_last_is_current_at_the_end_of_a_run_without_validation(root: Path, tmp_path: Path) -> None:
    data = small_data(root)
    trainer = fit(small_classifier(), data, LastCheckpoint(tmp_path, 1), limit_val_batches=0)
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == trainer.global_step


def test_a_stop_by_max_steps_within_an_epoch_can_be_resumed(
    root: Path, tmp_path: Path, handlers: dict[int, Any]
) -> None:
    """Lightning would count the epoch as finished, and a resume would skip the rest of it."""
    fit(small_classifier(), small_data(root), LastCheckpoint(tmp_path / "end"), max_steps=2, limit_val_batches=0)
    stop = StopOnSignal()
    callbacks = (stop, SignalAtStep(2, signal.SIGTERM), LastCheckpoint(tmp_path / "stop", stop=stop))
    with pytest.raises(Interrupted):
        fit(small_classifier(), small_data(root), *callbacks, limit_val_batches=0)
    ended, stopped = (load_checkpoint(tmp_path / name / "last.ckpt") for name in ("end", "stop"))
    assert ended["loops"] == stopped["loops"]
    assert (ended["epoch"], ended["global_step"]) == (0, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_ends_the_run(
    root: Path, tmp_path: Path, number: int, handlers: dict[int, Any]
) -> None:
    stop = StopOnSignal()
    with pytest.raises(Interrupted) as ended:
        fit(small_classifier(), small_data(root), stop, SignalAtStep(2, number), LastCheckpoint(tmp_path, stop=stop))
    assert (ended.value.signal_number, ended.value.step) == (number, 2)
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


def test_a_signal_at_the_end_of_an_epoch_saves_after_its_validation(
    root: Path, tmp_path: Path, handlers: dict[int, Any]
) -> None:
    data = small_data(root)
    data.setup("fit")
    batches = len(data.train_dataloader())
    stop = StopOnSignal()
    callbacks = (stop, SignalAtStep(batches, signal.SIGTERM), LastCheckpoint(tmp_path, stop=stop))
    with pytest.raises(Interrupted):
        fit(small_classifier(), data, *callbacks, max_epochs=2)
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == batches
    assert checkpoint["calibration"]["rows"] == len(data.split.validation)


def test_signal_handlers_are_restored_after_a_run(root: Path, tmp_path: Path, handlers: dict[int, Any]) -> None:
    fit(small_classifier(), small_data(root), StopOnSignal(), max_steps=1, limit_val_batches=0)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
