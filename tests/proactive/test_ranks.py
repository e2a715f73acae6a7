"""One, two and four processes over gloo: the same steps, the same weights, the same figures."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.helpers import SMALL_BACKBONE, SMALL_RUN, KeepFirstGradient, command, small_root
from tests.ranks import command_on_ranks

NO_DROPOUT = f"--model.scratch={json.dumps({**SMALL_BACKBONE, 'attention_dropout': 0.0})}"  # ranks draw differently


@dataclass(frozen=True)
class Fitted:
    """What a run of one epoch leaves behind."""

    first_gradient: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    figures: dict[str, float]


def fitted(root: Path, place: Path, devices: int, layout: str, task: str, launched: bool = True) -> Fitted:
    """Train for an epoch, the last step of which is short.

    Args:
        root: The data root.
        place: The working folder to make.
        devices: How many ranks.
        layout: The layout of micro-batches.
        task: The task, and its objective if it has several.
        launched: Lightning starts the other ranks, which import everything anew; else, they are forked.
    """
    task, *objective = task.split()
    options = [f"--task={task}", *SMALL_RUN, NO_DROPOUT, "--trainer.max_epochs=1"]
    options += [f"--model.objective={name}" for name in objective]
    options += [f"--data.root={root}", f"--data.layout={layout}"]
    options.append("--trainer.callbacks+=tests.helpers.KeepFirstGradient")
    if devices > 1:
        options += [f"--trainer.devices={devices}", "--trainer.strategy=ddp"]
    place.mkdir()
    if launched:
        ended = command("proactive.fit", *options, "--quiet", cwd=place)
    else:
        ended = command_on_ranks(devices, "proactive.fit", *options, "--quiet", cwd=place)
    assert (ended.returncode, ended.stdout) == (0, f"runs/{task}/0\n"), ended.stderr
    folder = place / "runs" / task / "0"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] > 1
    return Fitted(
        torch.load(place / KeepFirstGradient.FILE, weights_only=True),
        checkpoint["state_dict"],
        json.loads((folder / "metrics.json").read_text())["test"]["raw"],
    )


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert float((found[name] - values).norm() / values.norm()) < relative, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Fitted]]:
    """Gives, for a task, a data root and what one process learns from it."""

    @cache
    def fitted_alone(task: str) -> tuple[Path, Fitted]:
        place = tmp_path_factory.mktemp("alone")
        root = small_root(place / "root", rows_per_scene=20 if "preference" in task else 9)
        return root, fitted(root, place / "run", 1, "tree", task)

    return fitted_alone


@pytest.mark.parametrize(
    ("devices", "layout", "task", "launched"),
    [
        (2, "tree", "reward", True),
        (4, "tree", "reward", False),
        (2, "rows", "reward", False),
        (2, "tree", "agent", False),
        (2, "tree", "preference dpo", False),
        (2, "rows", "preference kto", False),
    ],
)
def test_several_ranks_train_like_one(
    devices: int,
    layout: str,
    task: str,
    launched: bool,
    alone: Callable[[str], tuple[Path, Fitted]],
    tmp_path: Path,
) -> None:
    """Gradients are clipped, rows are shared unevenly, one loss is averaged over the rows of all ranks."""
    root, expected = alone(task)
    shared = fitted(root, tmp_path / "shared", devices, layout, task, launched)
    assert_near(shared.first_gradient, expected.first_gradient, 1e-5)
    assert_near(shared.weights, expected.weights, 1e-4)  # after several steps of Adam
    assert shared.figures == pytest.approx(expected.figures, abs=1e-4)
