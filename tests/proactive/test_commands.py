"""The command `proactive` and how commands begin, whichever way they are started."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import proactive
from proactive import commands
from proactive.commands import COMMANDS, HELP_IS_CACHED
from tests.helpers import ROOT, python_m
from tests.patience import HANG
from tests.proactive.conftest import Ended

HEAVY = ("torch", "lightning", "torchmetrics", "transformers", "datasets")


def python(code: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines in a process of their own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG
    )


def test_help_lists_each_command_in_a_line(call: Callable[..., Ended]) -> None:
    ended = call(commands.main, "--help")
    assert (ended.code, ended.err) == (0, "")
    lines = [line.split(maxsplit=1) for line in ended.out.partition("--help):\n")[2].splitlines()]
    assert [tuple(line) for line in lines] == list(COMMANDS.items())
    assert call(commands.main).out == call(commands.main, "-h").out == ended.out
    assert call(commands.main, "--version").out == f"proactive {proactive.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_a_module_with_a_main(name: str) -> None:
    assert callable(importlib.import_module(f"proactive.{name}").main)


@pytest.mark.parametrize(("given", "meant"), [("fitt", "fit"), ("evalute", "evaluate"), ("inspct", "inspect")])
def test_an_unknown_command_gives_one_line_with_a_suggestion(
    given: str, meant: str, call: Callable[..., Ended]
) -> None:
    ended = call(commands.main, given, "--data.root=x")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: there is no command {given}; did you mean {meant}?\n  help: See proactive --help.\n"


def test_a_command_unlike_any_other_gets_no_suggestion(call: Callable[..., Ended]) -> None:
    assert call(commands.main, "zzz").err.splitlines()[0] == "error: there is no command zzz"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fitt"]], ids=str)
def test_help_and_version_load_no_library(arguments: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from proactive.commands import start
sys.argv[1:] = {arguments}
try:
    start()
finally:
    print([name for name in {HEAVY} if name in sys.modules])
"""
    assert python(code, tmp_path).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        *((name, ["--help"], f"usage: python -m proactive.{name}") for name in COMMANDS if name not in HELP_IS_CACHED),
        ("evaluate", ["reward", "--help"], "--data.layout LAYOUT"),
        ("evaluate", ["reward", "--checkpoint=nowhere"], "--checkpoint: there is no nowhere"),
        ("evaluate", ["reward", "--checkpoint=.", "--data.layout=x"], "data.layout: "),
        ("evaluate", ["agent", "--help"], "--agent.answers.max_new_tokens"),
        ("evaluate", ["agent", "--agent.baseline=never-propose"], "judge: expected one of --judge.checkpoint"),
        (
            "evaluate",
            ["agent", "--agent.baseline=never-propose", "--judge.checkpoint=nowhere"],
            "--judge.checkpoint: there is no nowhere",
        ),
        ("compare", ["nowhere"], "nowhere: no such folder"),
        ("inspect", ["--root", "nowhere"], "data.root: nowhere: no such file or folder"),
        ("export", ["--checkpoint=x", "--output=y", "--dtype=x"], "dtype: "),
        ("export", ["--checkpoint=nowhere", "--output=y"], "--checkpoint: there is no nowhere"),
        ("annotate", ["import", "nowhere", "--project=p"], "nowhere: No such file or directory"),
        ("simulate", ["traces", "--judge.checkpoint=nowhere"], "--judge.checkpoint: there is no nowhere"),
        ("simulate", ["traces", "--max_acts=2"], "traces, training data and report.html are in runs/simulate/0"),
        ("live", ["export", "nowhere", "--output=y"], "nowhere"),
        ("live", ["--gate=nowhere"], "--gate: there is no nowhere"),
        ("live", ["--source=nowhere"], "--source: nowhere"),
        ("live", ["--source=http://localhost:5600", "--shadow"], "--shadow: there is no gate"),
        ("gate", ["recalibrate", "--help"], "--gate GATE"),
        ("gate", ["recalibrate", "nowhere", "--gate=x", "--output=y"], "nowhere"),
    ],
)
def test_commands_that_need_no_torch_yet_start_without_it(
    command: str, arguments: list[str], said: str, tmp_path: Path
) -> None:
    """So that help and mistakes are told in about a second, and not in several."""
    code = f"""
import runpy, sys
sys.argv[1:] = {arguments}
try:
    runpy.run_module("proactive.{command}", run_name="__main__", alter_sys=True)
finally:
    print("imported:", [name for name in {HEAVY} if name in sys.modules])
"""
    ended = python(code, tmp_path, COLUMNS="200")
    assert said in ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "imported: []"


def test_importing_the_package_loads_no_library_and_never_exits(tmp_path: Path) -> None:
    code = f"import sys, proactive; print([name for name in {HEAVY} if name in sys.modules], proactive.__version__)"
    for rank in ("0", "x"):
        ended = python(code, tmp_path, RANK=rank)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout == f"[] {proactive.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_refuses_a_rank_that_is_none_before_lightning_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "x")
    for module, arguments in ((f"proactive.{name}", []), ("proactive", [name])):
        ended = python_m(module, *arguments, cwd=tmp_path)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == "error: the environment variable RANK is not a number: 'x'\n  help: unset RANK\n"


def test_help_names_the_command_as_it_was_started(tmp_path: Path) -> None:
    by_module = python_m("proactive.inspect", "--help", cwd=tmp_path)
    by_command = python_m("proactive", "inspect", "--help", cwd=tmp_path)
    assert (by_module.returncode, by_command.returncode) == (0, 0)
    assert by_module.stdout.startswith("usage: python -m proactive.inspect [--root")
    assert by_command.stdout.startswith("usage: proactive inspect [--root")


@pytest.mark.parametrize("name", ["datamodules", "models", "callbacks"])
@pytest.mark.parametrize("form", ["file", "package", "folder"])
def test_an_already_imported_package_of_the_same_name_is_reported(form: str, name: str, tmp_path: Path) -> None:
    if form == "file":
        (tmp_path / f"{name}.py").touch()
    else:
        (tmp_path / name).mkdir()
    if form == "package":
        (tmp_path / name / "__init__.py").touch()
    # Alone on the path, for a folder without __init__.py comes after any package of its name.
    code = f"import sys; path = sys.path; sys.path = ['']; import {name}; sys.path = path; import proactive"
    ended = python(code, tmp_path)
    assert ended.returncode == 1
    said = ended.stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: proactive needs its own package {name}, but <module '{name}'"), ended.stderr
    assert said.endswith("was imported before by that name; rename that one, or use it in another process")
