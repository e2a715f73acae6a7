"""What a command is started in: variables of other jobs, and standard output that takes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.errors import UserError
from proactive.environment import NUMBERS, refuse_impossible_rank
from tests.helpers import ROOT
from tests.patience import HANG


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "x"}, "RANK"),
        ({"RANK": "3"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ({"SLURM_PROCID": "3"}, "SLURM_PROCID"),
        ({"SLURM_NTASKS": "2"}, "SLURM_PROCID"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK"),
    ],
    ids=str,
)
def test_impossible_rank_variables_are_refused(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)
    refuse_impossible_rank()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        refuse_impossible_rank()


def test_full_output_and_a_rank_that_is_none_as_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "proactive.inspect", "--folds=3"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            arguments, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=HANG
        )
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 2), ended.stderr
    assert "No space left" in ended.stderr
    ended = subprocess.run(
        arguments, cwd=tmp_path, env={**environment, "RANK": "x"}, capture_output=True, text=True, timeout=HANG
    )
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 2), ended.stderr
