"""The plan command: figures that agree with each other, without weights, folders or a hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from callbacks.fully_sharded import FullySharded
from models.learning.preference_agent import PreferenceAgent
from proactive import plan
from proactive.planning import estimate
from tests.helpers import ROOT, SMALL_RUN
from tests.proactive.conftest import FinishedRun

SHAPE = ROOT / "benchmarks" / "shapes" / "llama_3_1_8b.yaml"


@pytest.fixture
def planned(call: Callable, root: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def get(*arguments: Any, rows: Path | None = None) -> dict[str, Any]:
        output = tmp_path / "plan.json"
        ended = call(plan.main, *arguments, "--data.root", rows or root, "--output", output, "--data.cache=false")
        assert ended.code == 0, ended.err
        assert "What it takes" in ended.out
        return json.loads(output.read_text())

    return get


def test_plan_leaves_no_files(planned: Callable, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    found = planned(*SMALL_RUN)
    memory = found["memory"]
    assert memory["peak"] == sum(size for name, size in memory.items() if name != "peak")
    assert memory["weights"] == memory["gradients"] == 4 * found["parameters"]
    assert memory["optimizer"] == 8 * found["parameters"]
    assert (found["layout"], found["fits"], found["seconds_an_epoch"]) == ("tree", None, None)
    assert found["epoch"]["tree"]["tokens"] < found["effective_tokens"] < found["epoch"]["rows"]["tokens"]
    assert not (tmp_path / "runs").exists()


def test_the_sizes_of_files_are_those_that_a_run_writes(planned: Callable, finished_run: FinishedRun) -> None:
    found = planned(*SMALL_RUN, rows=finished_run.root)["file_sizes"]
    checkpoints, export = finished_run.folder / "checkpoints", finished_run.folder / "export"
    written = {path.name: path.stat().st_size for path in checkpoints.iterdir()}
    written["export"] = sum(path.stat().st_size for path in export.iterdir())
    assert found == {name: pytest.approx(size, rel=0.2) for name, size in written.items()}
    options = ("--run.resumable_best=true", "--run.export_dtype=bfloat16")
    other = planned(*SMALL_RUN, *options, rows=finished_run.root)["file_sizes"]
    assert other["best.ckpt"] == found["last.ckpt"]
    assert found["export"] - other["export"] == (found["last.ckpt"] - found["best.ckpt"]) / 4  # of 8 bytes per weight


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preference_training_is_planned_with_the_second_forward_pass_of_kto(
    planned: Callable, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SMALL_RUN, "--task=preference", f"--model.objective={objective}", "--model.supervised_weight=0.1"]
    found = planned(*options, "--device=l4")
    assert found["memory"]["activations"] > 0
    assert found["epoch"]["tree"]["tokens"] < found["epoch"]["rows"]["tokens"]
    if objective == "kto":
        monkeypatch.setattr(PreferenceAgent, "extra_forward_passes", 0)
        once = planned(*options, "--device=l4")
        for name in ("operations_an_epoch", "seconds_an_epoch"):  # of 6 operations with a trained weight, 2 are forward
            assert found[name] == pytest.approx(once[name] * 4 / 3)


def test_online_training_is_not_planned(call: Callable, tmp_path: Path) -> None:
    ended = call(plan.main, "--task=online", "--model.judge=a run", *SMALL_RUN)
    assert ended.code == 2
    assert "--task online: its rows are written while it trains" in ended.err


def test_an_8b_recipe_on_a_24_gib_card(planned: Callable) -> None:
    qlora = ROOT / "configs" / "reward" / "qlora.yaml"
    arguments = ["--config", qlora, "--config", SHAPE, "--data.split", "by_scene", "--data.folds", "3"]
    found = planned(*arguments, "--device", "rtx 4090")
    assert found["fits"] is True
    assert found["memory"]["peak"] < 16 * 2**30
    assert found["room"] == 24 * 2**30
    assert found["seconds_an_epoch"] > 0
    assert found["change"] is None


def test_a_run_that_does_not_fit_gets_a_change_that_does(planned: Callable) -> None:
    paper = ROOT / "configs" / "reward" / "paper.yaml"
    arguments = ["--config", paper, "--config", SHAPE, "--data.split", "by_scene", "--data.folds", "3"]
    found = planned(*arguments, "--device", "h100", "--devices", 1)
    assert found["fits"] is False
    assert found["change"]["peak"] <= 80 * 2**30
    assert "devices" in found["change"]["what"][0]


def test_mistakes_take_two_lines(call: Callable, root: Path) -> None:
    for arguments, message in (
        (["--memory", "much"], "--memory: much is not a size"),
        (["--device", "abacus"], "--device: abacus is not known"),
        (["--devices", "0"], "devices: expected 1 or more, got 0"),
    ):
        ended = call(plan.main, *SMALL_RUN, "--data.root", root, *arguments)
        assert ended.code == 2
        assert message in ended.err


def test_an_unreachable_backbone_is_planned_from_its_shape(
    call: Callable, planned: Callable, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    small = [one for one in SMALL_RUN if not one.startswith("--model.scratch")]
    arguments = [*small, "--model.backbone", "someone/some-model"]
    ended = call(plan.main, *arguments, "--data.root", root, "--data.cache=false")
    assert ended.code == 2
    assert "--model.scratch" in ended.err
    scratch = next(one for one in SMALL_RUN if one.startswith("--model.scratch"))
    found = planned(*arguments, scratch)
    assert "a tokenizer trained on the data, because someone/some-model is not available" in found["tokens_counted_by"]
    assert "someone/some-model" in found["backbone"]


@pytest.mark.parametrize(
    ("strategy", "sharing"),
    [
        ("auto", "replicated"),
        ("ddp", "replicated"),
        ("fully_sharded", "sharded"),
        ("fsdp", "sharded"),
        (FullySharded(), "sharded"),
    ],
)
def test_strategies_are_classified_by_what_they_shard(strategy: Any, sharing: str) -> None:
    assert estimate._sharing(strategy, devices=4) == sharing


def test_time_uses_the_utilization_measured_on_the_device(planned: Callable) -> None:
    """On a Hopper card with all weights; else with what is assumed; and with what is given, if it is."""
    full = ["--config", ROOT / "configs" / "reward" / "full_1x80gb.yaml", "--config", SHAPE]
    full += ["--data.split", "by_scene", "--data.folds", "3"]
    measured = planned(*full, "--device", "h200")
    assert (measured["utilization"], measured["utilization_is"]) == (0.36, "measured")
    expected = measured["operations_an_epoch"] / (989e12 * 0.36)
    assert measured["seconds_an_epoch"] == pytest.approx(expected)
    for more, found in (
        (["--device", "a100"], (0.4, "assumed")),
        (["--device", "h200", "--devices", "2"], (0.4, "assumed")),
        (["--device", "h200", "--utilization", "0.5"], (0.5, "given")),
    ):
        plan = planned(*full, *more)
        assert (plan["utilization"], plan["utilization_is"]) == found
