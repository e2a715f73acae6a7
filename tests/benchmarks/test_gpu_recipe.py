"""The GPU benchmark runs from end to end; what it measures here means nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, small_root
from tests.patience import HANG


@pytest.mark.parametrize("how", ["full", "qlora"])
def test_the_script_runs_small_and_prints_its_figures(tmp_path: Path, how: str) -> None:
    root = small_root(tmp_path / "root", rows_per_scene=14)
    script = ROOT / "benchmarks" / "gpu_recipe.py"
    part = ["--small", "true", "--epochs", "0.5", "--validation_fraction", "0.1", "--how", how]
    path = os.pathsep.join([str(ROOT), *sys.path])
    ended = subprocess.run(
        [sys.executable, script, "--root", root, *part],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout[ended.stdout.index("{") :])
    assert found["steps_measured"] >= 1
    assert found["recipe_seconds_are"] == "measured steps times count"
    assert found["utilization"] > 0
    assert found["planned_memory_gib"] > 0
    assert found["tokens_per_step"] > 32
