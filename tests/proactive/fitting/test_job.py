"""The run folder of a job: new for each run of a process, and the same for the processes that rank 0 starts."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from proactive import fit
from proactive.fitting.job import FOLDER_VARIABLE, choose_folder, folder_for_children, folder_from_rank_0
from tests.helpers import SMALL_RUN


def test_a_second_run_in_the_same_process_gets_a_folder_of_its_own(
    call: Callable, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    arguments = [*SMALL_RUN, f"--data.root={root}", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--quiet"]
    for number in range(2):
        ended = call(fit.main, *arguments)
        assert (ended.code, ended.out) == (0, f"runs/reward/{number}\n"), ended.err
        assert FOLDER_VARIABLE not in os.environ


def test_processes_started_for_a_run_take_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    chosen = choose_folder(tmp_path, "reward", None)
    assert chosen == tmp_path / "reward" / "0"
    with folder_for_children(chosen):
        assert folder_from_rank_0() == chosen
        assert choose_folder(tmp_path, "reward", None) == chosen
    assert folder_from_rank_0() is None
    assert choose_folder(tmp_path, "reward", None) == tmp_path / "reward" / "1"
