"""Where trained weights are: the best ones of a run, also after a kill while one was replaced, and nothing else."""

from pathlib import Path

import pytest

from datamodules.errors import UserError
from datamodules.files.run_folders import FOLDS_FILE
from datamodules.files.writing import put_in_place
from models.learning.checkpoint_paths import BEST, EXPORT_STATE, LAST, VALUES, weights_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_run_folder_names_its_best_weights_or_else_its_last(tmp_path: Path) -> None:
    last = touch(tmp_path / "checkpoints" / LAST)
    assert weights_path(tmp_path, "--gate") == last
    best = touch(tmp_path / "checkpoints" / BEST / VALUES).parent
    assert weights_path(tmp_path, "--gate") == best == weights_path(best, "--gate")
    assert weights_path(last, "--gate") == last


def test_an_export_folder_names_itself(tmp_path: Path) -> None:
    touch(tmp_path / EXPORT_STATE)
    assert weights_path(tmp_path, "--gate") == tmp_path


@pytest.mark.parametrize("name", [EXPORT_STATE, VALUES])
def test_a_folder_that_a_kill_left_aside_is_restored(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = touch(tmp_path / "old" / name).parent, touch(tmp_path / "new" / name).parent
    monkeypatch.setattr("datamodules.files.writing._exchange", lambda one, other: False)
    monkeypatch.setattr("pathlib.Path.replace", lambda path, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        put_in_place(new, old)
    assert not old.exists()
    assert weights_path(old, "--gate") == old
    assert (old / name).is_file()


def test_a_cross_validation_is_refused_where_one_run_is_needed(tmp_path: Path) -> None:
    (tmp_path / FOLDS_FILE).touch()
    for run in ("fold-0/0", "fold-0/1", "fold-1/0"):
        (tmp_path / run).mkdir(parents=True)
    with pytest.raises(UserError, match=r"^--gate: .* holds a run for each fold") as refused:
        weights_path(tmp_path, "--gate")
    assert refused.value.hint == f"Give one of them: {tmp_path / 'fold-0' / '1'}."


def test_other_paths_are_refused_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--gate: there is no {tmp_path / 'nowhere'}"):
        weights_path(tmp_path / "nowhere", "--gate")
    with pytest.raises(UserError, match=f"^--gate: {tmp_path} has no checkpoint"):
        weights_path(tmp_path, "--gate")
