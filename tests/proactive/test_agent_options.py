"""What the options of agents, judges and gates name."""

from pathlib import Path

import pytest

from datamodules.errors import UserError
from datamodules.files.run_folders import FOLDS_FILE
from models.learning.checkpoint_paths import EXPORT_STATE
from proactive.agent_options import given_weights


def export(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / EXPORT_STATE).touch()
    return folder


def test_a_cross_validation_names_the_newest_run_of_each_fold(tmp_path: Path) -> None:
    folds = tmp_path / "folds"
    runs = [export(folds / f"fold-{fold}" / "0") for fold in range(11)]
    runs[9] = export(folds / "fold-9" / "1")
    (folds / FOLDS_FILE).touch()
    (folds / "fold-0 copy").mkdir()
    single = export(tmp_path / "single")
    assert given_weights("--gate", [single, folds]) == [single, *runs]
    assert given_weights("--gate", None) == []


def test_a_fold_without_weights_is_refused(tmp_path: Path) -> None:
    export(tmp_path / "fold-0" / "0")
    unfinished = tmp_path / "fold-1" / "0"
    unfinished.mkdir(parents=True)
    (tmp_path / FOLDS_FILE).touch()
    with pytest.raises(UserError, match=f"^--gate: {unfinished} has no checkpoint"):
        given_weights("--gate", [tmp_path])


def test_a_cross_validation_that_has_not_begun_is_refused(tmp_path: Path) -> None:
    (tmp_path / FOLDS_FILE).touch()
    with pytest.raises(UserError, match=f"^--gate: {tmp_path} holds a run for each fold"):
        given_weights("--gate", [tmp_path])
