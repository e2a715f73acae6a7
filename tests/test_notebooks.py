"""The notebooks run from the first to the last cell, in a folder of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment_of_commands
from tests.patience import HANG

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_cells_of_a_notebook_run(notebook: Path, tmp_path: Path) -> None:
    """As one script: the cells are plain Python without magics, so no Jupyter is needed."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), "outputs become stale"
    script = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment_of_commands(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert ended.returncode == 0, ended.stderr
    metrics = json.loads((tmp_path / "runs" / "reward" / "0" / "metrics.json").read_text())
    found = re.search(r"mistakes on (\d+) test rows; accuracy ([\d.]+)", ended.stdout)
    assert found is not None, ended.stdout
    assert int(found[1]) == metrics["tested_rows"]
    assert float(found[2]) == pytest.approx(metrics["test"]["calibrated"]["accuracy"], abs=0.0015)
    assert ended.stdout.count("P(accepted)") == 3


def test_at_least_one_notebook_exists() -> None:
    assert NOTEBOOKS
