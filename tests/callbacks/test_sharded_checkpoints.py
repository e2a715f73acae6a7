"""Checkpoints that ranks write together: resumed on other numbers of ranks, never half there, never code."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.corpus.sources import load_corpus
from datamodules.errors import UserError
from datamodules.files.writing import recover
from models.learning.checkpoint_files import checkpoint_problem, load_checkpoint, load_run
from models.learning.checkpoint_paths import VALUES, is_sharded
from models.learning.reward_classifier import RewardClassifier
from tests.callbacks.sharded_runs import disk_full_on_one_rank, fitted_to, killed_while_saving
from tests.gguf_files import small_llama, with_cache, write_gguf
from tests.models.small import LLAMA
from tests.ranks import on_ranks


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two epochs on one device."""
    folder = tmp_path_factory.mktemp("whole")
    return on_ranks(1, fitted_to, 12, root, folder, None, False, folder=folder)


@pytest.fixture(scope="module")
def of_four(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of four ranks that were stopped after four steps."""
    folder = tmp_path_factory.mktemp("of_four")
    return folder / "last.ckpt", on_ranks(4, fitted_to, 4, root, folder, None, folder=folder)


def assert_as_whole(parts: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    curve = [values for part in parts for values in part["curve"]]
    assert len(curve) == 12
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(whole["curve"]), rtol=1e-4, atol=1e-4)
    for name, weight in whole["after"].items():
        torch.testing.assert_close(parts[-1]["after"][name], weight, rtol=0, atol=1e-4, msg=name)
    assert parts[-1]["temperature"] == pytest.approx(whole["temperature"], rel=1e-3)


def test_a_checkpoint_of_four_ranks_resumes_on_two_then_on_one(
    root: Path, whole: dict[str, Any], of_four: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, first = of_four
    second = on_ranks(2, fitted_to, 8, root, tmp_path / "two", str(path), folder=tmp_path)
    third = on_ranks(1, fitted_to, 12, root, tmp_path / "one", str(tmp_path / "two" / "last.ckpt"), folder=tmp_path)
    assert_as_whole([first, second, third], whole)


def test_a_sharded_checkpoint_resumes_on_one_device_and_back(
    root: Path, whole: dict[str, Any], of_four: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """A device without any sharding reads what ranks wrote, and ranks read what it wrote."""
    last = tmp_path / "run" / "last.ckpt"
    shutil.copytree(of_four[0], last)
    second = on_ranks(1, fitted_to, 8, root, last.parent, str(last), False, folder=tmp_path)
    assert last.is_file()  # in the folder's place
    third = on_ranks(2, fitted_to, 12, root, last.parent, str(last), folder=tmp_path)
    assert is_sharded(last)
    assert_as_whole([of_four[1], second, third], whole)


def test_the_8_bit_optimizer_resumes_with_other_numbers_of_ranks(root: Path, tmp_path: Path) -> None:
    """On four, on one without sharding, and on three: codes, scales and all."""
    options = {"scratch": LLAMA, "optimizer": "adamw_8bit"}
    whole = on_ranks(1, fitted_to, 12, root, tmp_path / "whole", None, False, options, folder=tmp_path / "results")
    parts, resumed = [], None
    for number, (ranks, step, spread) in enumerate([(4, 3, True), (2, 6, True), (1, 9, False), (3, 12, True)]):
        folder = tmp_path / str(number)
        parts.append(
            on_ranks(ranks, fitted_to, step, root, folder, resumed, spread, options, folder=folder / "results")
        )
        resumed = str(folder / "last.ckpt")
    curve = [values for part in parts for values in part["curve"]]
    assert len(curve) == 12
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(whole["curve"]), rtol=5e-3, atol=5e-3)
    for name, weight in whole["after"].items():
        torch.testing.assert_close(parts[-1]["after"][name], weight, rtol=0, atol=5e-3, msg=name)


def test_frozen_layers_of_a_gguf_file_resume_with_and_without_ranks(root: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "small.gguf", *small_llama(load_corpus(str(root)).train))
    options = {"backbone": str(file), "freeze_layers": 1, "learning_rate": 1e-3}

    def fitted(ranks: int, step: int, name: str, resumed: str | None = None) -> dict[str, Any]:
        last = resumed and str(tmp_path / resumed / "last.ckpt")
        given = (step, root, tmp_path / name, last, ranks > 1, options)
        return on_ranks(ranks, with_cache, tmp_path / "cache", fitted_to, *given, folder=tmp_path / name)

    whole = fitted(1, 12, "whole")
    parts = [fitted(2, 4, "first"), fitted(1, 8, "second", "first"), fitted(2, 12, "third", "second")]
    assert_as_whole(parts, whole)


@pytest.mark.parametrize("when", ["write_shards", "put_in_place"])
def test_a_kill_while_saving_loses_no_checkpoint(when: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a rank failed"):
        on_ranks(2, killed_while_saving, root, tmp_path, when, folder=tmp_path)
    last = tmp_path / "last.ckpt"
    assert last.exists() == (when == "write_shards")
    assert load_run(recover(last), RewardClassifier)["global_step"] == 1


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_loses_no_checkpoint(root: Path, tmp_path: Path) -> None:
    said = on_ranks(2, disk_full_on_one_rank, root, tmp_path, folder=tmp_path / "results")
    assert len(said) == 2
    for what in said:
        assert what == f"cannot write {tmp_path / 'last.ckpt'}: File too large (rank 1)"
    assert load_run(tmp_path / "last.ckpt", RewardClassifier)["global_step"] == 1


def test_damaged_sharded_checkpoints_are_refused(of_four: tuple[Path, Any], tmp_path: Path) -> None:
    good, bad = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    shutil.copytree(of_four[0], good)
    for place in ("weights", "optimizer", "values.pt"):
        shutil.copytree(of_four[0], bad)
        path = next((bad / place).iterdir()) if (bad / place).is_dir() else bad / place
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert "damaged" in str(checkpoint_problem(bad))
        with pytest.raises(UserError) as raised:
            load_checkpoint(bad)
        assert str(good) in raised.value.hint
        path.unlink()
        assert checkpoint_problem(bad) is not None
        shutil.rmtree(bad)


def test_a_sharded_checkpoint_with_code_is_refused(of_four: tuple[Path, Any], tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "executed",)

    bad = tmp_path / "last.ckpt"
    shutil.copytree(of_four[0], bad)
    values = torch.load(bad / VALUES, weights_only=True)
    torch.save(values | {"payload": Payload()}, bad / VALUES)
    assert not list(bad.rglob(".metadata"))  # the pickled index of the usual format
    with pytest.raises(UserError, match="could run code"):
        load_checkpoint(bad)
    assert not (tmp_path / "executed").exists()
