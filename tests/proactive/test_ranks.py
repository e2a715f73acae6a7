"""One, two and four processes over gloo: the same steps, the same weights, the same figures."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import SMALL_BACKBONE, SMALL_RUN, command, small_root

NO_DROPOUT = f"--model.scratch={json.dumps({**SMALL_BACKBONE, 'attention_dropout': 0.0})}"  # ranks draw differently


def fitted(
    root: Path, place: Path, devices: int, layout: str, task: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights and test figures after an epoch, the last step of which is short."""
    options = [
        f"--task={task}",
        *SMALL_RUN,
        NO_DROPOUT,
        f"--data.root={root}",
        f"--data.layout={layout}",
        "--trainer.max_epochs=1",
    ]
    if devices > 1:
        options += [f"--trainer.devices={devices}", "--trainer.strategy=ddp"]
    place.mkdir()
    ended = command("proactive.fit", *options, "--quiet", cwd=place)
    assert (ended.returncode, ended.stdout) == (0, f"runs/{task}/0\n"), ended.stderr
    folder = place / "runs" / task / "0"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] >= 2
    return checkpoint["state_dict"], json.loads((folder / "metrics.json").read_text())["test"]["raw"]


@pytest.mark.parametrize(
    ("devices", "layout", "task"),
    [(2, "tree", "reward"), (4, "tree", "reward"), (2, "rows", "reward"), (2, "tree", "agent")],
)
def test_ranks_share_a_step_and_change_nothing(devices: int, layout: str, task: str, tmp_path: Path) -> None:
    """Gradients are clipped, rows are shared unevenly, one loss is averaged over the rows of all ranks."""
    root = small_root(tmp_path / "root")
    alone, alone_figures = fitted(root, tmp_path / "alone", 1, "tree", task)
    shared, shared_figures = fitted(root, tmp_path / "shared", devices, layout, task)
    for name, weight in alone.items():
        assert float((shared[name] - weight).norm() / weight.norm()) < 1e-4, name  # after several steps of Adam
    assert shared_figures == pytest.approx(alone_figures, abs=1e-4)
