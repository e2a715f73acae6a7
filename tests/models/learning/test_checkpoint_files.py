"""Checkpoints are complete or absent, run no code, and are saved only between steps; randomness needs no state."""

import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoint_io import SafeCheckpointIO
from callbacks.saving import LastCheckpoint
from callbacks.seeding import SeedEachStep
from callbacks.stopping import Interrupted, StopOnSignal
from datamodules.errors import UserError
from models.learning.checkpoint_files import load_checkpoint
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from tests.helpers import ROOT, SignalAtStep
from tests.models.small import fit, small_classifier, small_data
from tests.patience import HANG

CONTENT: dict[str, Any] = {
    "state_dict": {"weight": torch.arange(6.0), "half": torch.ones(2, 2, dtype=torch.bfloat16)},
    "epoch": 1,
    "loops": {"names": ["a", None], "ratio": 0.5, "on": True},
}


def run_content(task: str) -> dict[str, Any]:
    """The content of a run's checkpoint, with empty weights."""
    data = {
        "hyperparameters": {"root": "embedded", "seed": 0},
        "prompt": {},
        "tokenizer": {"json": "{}", "special": {"pad_token": "<pad>"}},
        "training_histories": [-1],
        "training_scenes": ["ff"],
        "training_rows": "0123",
    }
    return {
        "state_dict": CONTENT["state_dict"],
        "epoch": 1,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "task": task,
        "hyper_parameters": {},
        "backbone_config": '{"model_type": "llama"}',
        "calibration": None,
        f"{task.title()}DataModule": data,
    }


class Payload:
    """Creates a file if a pickle with it is loaded without weights_only."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


class Unpicklable:
    """Fails in the middle of a save, after weights were written."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        raise RuntimeError("this cannot be pickled")


def save(path: Path, content: dict[str, Any] = CONTENT) -> Path:
    SafeCheckpointIO(RewardClassifier).save_checkpoint(content, path)
    return path


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return bool(one == other)


def test_a_saved_checkpoint_is_loaded(tmp_path: Path) -> None:
    content = run_content("reward")
    path = save(tmp_path / "new" / "folder" / "last.ckpt", content)
    assert same(load_checkpoint(path), content)
    assert same(SafeCheckpointIO(RewardClassifier).load_checkpoint(path), content)
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_is_not_one_of_a_run_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="field task"):
        SafeCheckpointIO(RewardClassifier).load_checkpoint(path)


def test_a_run_of_the_other_task_is_refused(tmp_path: Path) -> None:
    content = run_content("agent")
    path = save(tmp_path / "last.ckpt", content)
    assert same(SafeCheckpointIO(ProactiveAgent).load_checkpoint(path), content)
    with pytest.raises(UserError, match="is of task agent, not reward"):
        SafeCheckpointIO(RewardClassifier).load_checkpoint(path)


def test_a_save_that_fails_keeps_the_former_file(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        save(path, {"state_dict": {"weight": torch.zeros(1000)}, "odd": Unpicklable()})
    assert same(load_checkpoint(path), CONTENT)
    assert list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from callbacks.checkpoint_io import SafeCheckpointIO
from models.learning.reward_classifier import RewardClassifier
from datamodules.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    SafeCheckpointIO(RewardClassifier).save_checkpoint({"weight": torch.ones(1_000_000)}, sys.argv[1])
except UserError as error:
    print(error.what, "|", error.hint)
"""


def test_a_full_disk_is_reported_and_keeps_the_former_file(tmp_path: Path) -> None:
    """A limit on file sizes makes a write fail like a full disk."""
    path = save(tmp_path / "last.ckpt")
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=HANG,
    )
    assert same(load_checkpoint(path), CONTENT)
    assert list(tmp_path.iterdir()) == [path]
    assert result.returncode == 0, result.stderr[-500:]
    assert str(path) in result.stdout
    assert "room" in result.stdout


def another_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "This is no checkpoint.")


def old_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"payload": Payload(path.parent / "executed")}))


def old_torch_file(path: Path) -> None:
    torch.save({"payload": Payload(path.parent / "executed")}, path, _use_new_zipfile_serialization=False)


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


SPOILT: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut by one byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut to a half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros at the end": lambda path: path.write_bytes(path.read_bytes()[:-800] + bytes(800)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("not a checkpoint"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another archive": another_archive,
    "another object": lambda path: torch.save(torch.ones(2), path),
    "TorchScript": script,
    "pickle payload": lambda path: torch.save({"payload": Payload(path.parent / "executed")}, path),
    "old torch file with a payload": old_torch_file,
    "plain pickle with a payload": old_pickle,
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_bad_checkpoint_is_named_and_refused_and_runs_no_code(spoil: str, tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    SPOILT[spoil](path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in error.value.what
    assert "\n" not in error.value.what + error.value.hint
    assert not (tmp_path / "executed").exists()


def test_the_payload_of_these_tests_would_leave_its_mark(tmp_path: Path) -> None:
    torch.save({"payload": Payload(tmp_path / "executed")}, tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("spoil", ["missing", "empty", "cut to a half"])
def test_the_newest_good_checkpoint_is_offered(spoil: str, tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    for age, name in enumerate(("newest-but-broken.ckpt", "best.ckpt", "oldest.ckpt")):
        save(tmp_path / name)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "newest-but-broken.ckpt").write_bytes(b"broken")
    os.utime(tmp_path / "newest-but-broken.ckpt", (1e9, 1e9))
    SPOILT[spoil](path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(tmp_path / "best.ckpt") in error.value.hint


def test_without_a_good_checkpoint_none_is_offered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no good checkpoint"):
        load_checkpoint(tmp_path / "last.ckpt")


def refused_or_unchanged(path: Path) -> bool:
    try:
        return same(load_checkpoint(path), CONTENT)
    except UserError:
        return True


@given(place=st.integers(0, 100_000), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_detected_or_changes_nothing(place: int, bit: int, tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    assert refused_or_unchanged(path)


@pytest.mark.parametrize(
    ("offset", "bit"),
    [(-8, 0x10), (-38, 0x01), (-36, 0x08), (-37, 0x08), (0, 0x80)],
    ids=["a folder", "encrypted", "compressed", "a name in UTF-8", "another name"],
)
def test_a_flipped_bit_in_the_table_of_contents_is_detected(offset: int, bit: int, tmp_path: Path) -> None:
    """No checksum covers the table of contents. PyTorch reads an entry marked as a folder as zeros."""
    path = save(tmp_path / "last.ckpt")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"archive/data/0") + offset] ^= bit
    path.write_bytes(content)
    assert refused_or_unchanged(path)


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


class Draws(Callback):
    """Draws at the start of each step, as dropout would; `waste` draws more after each."""

    def __init__(self, waste: int = 0) -> None:
        self.waste = waste
        self.drawn: dict[tuple[int, int], float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.drawn[trainer.current_epoch, batch_idx] = float(torch.rand(1, dtype=torch.float64))

    def on_train_batch_end(self, *args: Any) -> None:
        torch.rand(self.waste)


def drawn(root: Path, seed: int, waste: int = 0) -> dict[tuple[int, int], float]:
    draws = Draws(waste)
    fit(small_classifier(), small_data(root), SeedEachStep(seed), draws, max_epochs=2, limit_val_batches=0)
    return draws.drawn


def test_random_numbers_of_a_step_depend_only_on_seed_epoch_and_step(root: Path) -> None:
    """Earlier random numbers have no effect, so a resumed run needs no state of the generator."""
    first = drawn(root, seed=7)
    assert drawn(root, seed=7, waste=3) == first
    assert len(set(first.values())) == len(first), "no two steps of two epochs draw alike"
    assert not set(drawn(root, seed=8).values()) & set(first.values())


def test_ranks_draw_different_random_numbers() -> None:
    """A fake trainer gives the rank: the callback reads only two of its numbers, and two ranks need two processes."""
    numbers = []
    for rank in (0, 1, 2, 0):
        trainer: Any = SimpleNamespace(current_epoch=1, global_rank=rank)
        SeedEachStep(7).on_train_batch_start(trainer, small_classifier(), None, 3)
        numbers.append(float(torch.rand(1)))
    assert len(set(numbers)) == 3
    assert numbers[0] == numbers[3]
