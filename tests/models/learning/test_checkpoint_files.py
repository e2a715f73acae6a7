"""Checkpoints are complete or absent, run no code, and are saved only between steps; randomness needs no state."""

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from callbacks.checkpoint_io import SafeCheckpointIO
from datamodules.errors import UserError
from models.learning.checkpoint_files import load_checkpoint
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from tests.helpers import ROOT
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


def test_the_payload_leaves_a_mark_if_it_is_unpickled(tmp_path: Path) -> None:
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
