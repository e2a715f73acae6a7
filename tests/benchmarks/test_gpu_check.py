"""The GPU check runs from end to end on a CPU; what it measures there means nothing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.benchmarks.test_scripts import loaded
from tests.helpers import ROOT, small_root
from tests.patience import HANG

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setitem(sys.modules, "gpu_check", module := loaded(SCRIPT))  # dataclasses look there
    precision = torch.get_float32_matmul_precision()
    yield module
    torch.set_float32_matmul_precision(precision)  # a part sets it in this process


def process(check: ModuleType, code: str) -> Any:
    return check.Process([sys.executable, "-c", code])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = small_root(tmp_path_factory.mktemp("root"), rows_per_scene=14)
    (root / "test_data").mkdir()
    answered = {"agent_response": {"candidate_task": ["Help."]}, "task_status": True}
    events = [
        {"observation": {"time": str(second), "event": f"opens file {second}"}, **answered} for second in range(4)
    ]
    for name in ("one", "two"):
        (root / "test_data" / f"{name}.json").write_text(json.dumps(events))
    return root


def assert_recipe(figures: dict[str, Any]) -> None:
    assert figures["steps_measured"] == 2
    assert 16 < figures["rows_per_step"] <= 32
    assert figures["tokens_per_step"] > 32
    assert figures["utilization"] > 0
    assert figures["planned_memory_gib"] > 0
    assert len(figures["losses"]) == 8  # 5 to warm up, 2 that are timed, 1 that is profiled
    assert figures["profile"]["top_on_processor"]


def test_the_command_prints_the_figures_of_its_parts(root: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--root", root, "--small", "true", "--only", "[full, fsdp2]"],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [one["state"] for one in found.values()] == ["passed", "passed"]
    full, fsdp2 = (found[name]["figures"] for name in ("full", "fsdp2"))
    assert_recipe(full)
    assert_recipe(fsdp2)
    assert full["losses"] == pytest.approx(fsdp2["losses"], abs=1e-5)
    assert "seconds_per_step" in ended.stdout
    assert "the figures mean nothing" in ended.stdout


def test_parts_run_small(check: ModuleType, root: Path) -> None:
    assert check.PARTS["card"].measure(str(root), True)["bf16_matrix_rate_tflops"] > 0
    trees = check.PARTS["trees"].measure(str(root), True)
    assert (trees["auto_is"], trees["rows_is"]) == ("tree", "rows")
    qlora = check.PARTS["qlora"].measure(str(root), True)
    assert_recipe(qlora)
    generation = check.PARTS["generation"].measure(str(root), True)
    assert generation["same_tokens"] is True
    assert generation["all traces side by side"]["new_tokens"] == 2 * 3 * 8
    assert generation["generate, one padded batch of 4 traces"]["new_tokens"] == 2 * 3 * 8


def test_an_unknown_part_is_refused(check: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no part fast\n  help: Give some of card, trees"):
        check.main(str(tmp_path), only=["card", "fast"])


def test_a_failing_part_reports_why_and_keeps_its_figures(check: ModuleType) -> None:
    found = process(check, "print('{\"a\": 1}'); raise ValueError('too warm')").finish(HANG)
    assert found["state"] == "failed"
    assert found["figures"] == {"a": 1}
    assert found["error"].endswith("ValueError: too warm\n")


CHILD = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(3600)"


def test_a_part_over_its_time_limit_is_ended_with_its_children(check: ModuleType, tmp_path: Path) -> None:
    """Its child holds the pipe that is read to its end here."""
    there = tmp_path / "there"
    code = f"import subprocess, sys; print('{{}}', flush=True); subprocess.run([sys.executable, '-c', {CHILD!r}, "
    started = process(check, f"{code} {str(there)!r}])")
    while not there.exists():
        time.sleep(0.05)
    found = started.finish(0.1)
    assert found["state"] == "ended"
    assert found["figures"] == {}
    assert found["error"].endswith("it took longer than 0 s")


def test_the_table_holds_figures_to_their_targets(check: ModuleType) -> None:
    figures = {"recipe_seconds": 40.0, "utilization": 0.5, "planned_over_measured": 1.05}
    found = {
        "full": {"state": "passed", "figures": figures},
        "qlora": {"state": "failed", "error": "some lines\nOutOfMemoryError: no room\n"},
    }
    console = Console(width=140, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(check.table(found, check.PARTS, small=False))
    lines = console.export_text().splitlines()

    def line(figure: str) -> str:
        return next(line for line in lines if figure in line)

    assert "at most 50" in line("recipe_seconds")
    assert "reached" in line("recipe_seconds")
    assert "missed" in line("utilization")
    assert "0.9 to 1.1" in line("planned_over_measured")
    assert "missed" in line("first_step_seconds"), "what is not known reaches no target"
    assert "OutOfMemoryError: no room" in line("qlora")


def test_two_ranks_equal_one_and_a_killed_rank_is_survived(check: ModuleType, root: Path) -> None:
    """The same as on GPUs, over gloo."""
    parts = check.parts(2)
    assert list(parts) == ["losses", "efficiency", "killed"]
    losses = parts["losses"].measure(str(root), True)
    assert losses["losses_agree"] is True
    assert losses["steps"] == 7
    killed = parts["killed"].measure(str(root), True)
    assert killed["exit_code_after_the_kill"] != 0
    assert killed["resumed_on"] == 1
    assert killed["figures_differ_by"] < 0.05


def test_what_does_not_hold_fails_and_keeps_its_figures(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"losses_agree": False, "loss_difference": 0.5}
    monkeypatch.setattr(check.several_gpus, "losses", lambda devices, root, small: found)
    with pytest.raises(check.WrongError, match="losses_agree does not hold"):
        check.parts(8)["losses"].measure("root", True)
    assert json.loads(capsys.readouterr().out) == found
