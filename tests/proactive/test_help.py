"""The help of `fit` and `plan`: what it lists, and its cache."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from proactive import commands, fit, plan
from proactive.commands import HELP_IS_CACHED
from proactive.fitting.trainer_options import REFUSED
from proactive.tasks import TASKS
from tests.proactive.conftest import Ended
from tests.proactive.test_commands import HEAVY, python

OPTION = re.compile(r"^  (-.*?)(?:  |$)", re.MULTILINE)
REFUSED_VALUES = {
    "accumulate_grad_batches": "2",
    "gradient_clip_val": "0.5",
    "gradient_clip_algorithm": "value",
    "enable_checkpointing": "false",
    "barebones": "true",
    "overfit_batches": "1",
}
Call = Callable[..., Ended]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for caches."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    return folder / "proactive" / "help"


def listed(shown: str) -> list[str]:
    """The long names of the options in a help, without dashes. `--name+`, which adds to a list, is no other option."""
    names = [name for line in OPTION.findall(shown) for name in re.findall(r"(?<!=)--([\w.]+\+?)", line)]
    return [name for name in names if not name.endswith("+")]


def configured(shown: str) -> set[str]:
    """The names of the options in a printed configuration."""
    content = yaml.safe_load(shown)
    names = {f"{group}.{name}" for group in ("trainer", "model", "data", "run") for name in content.pop(group)}
    return names | content.keys()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("module", [fit, plan], ids=["fit", "plan"])
def test_help_lists_each_accepted_option_once_and_no_other(module: ModuleType, task: str, call: Call) -> None:
    given = [f"--task={task}", *(["--model.judge=x"] if task == "online" else [])]
    accepted = configured(call(module.main, *given, "--print_config").out)
    everything = listed(call(module.main, *given, "--help=all").out)
    short = listed(call(module.main, *given, "--help").out)
    for names in (everything, short):
        assert len(names) == len(set(names))
    not_configured = {"help", "print_config", "config", "ckpt_path", "quiet", "debug", "trainer", "model", "data"}
    assert {name for name in everything if not name.endswith(".help")} - not_configured == accepted - not_configured
    of_lightning = [name for name in everything if name.startswith("trainer") and name not in short]
    assert set(everything) - set(of_lightning) == set(short)
    assert not {f"trainer.{name}" for name in REFUSED} & set(everything)
    assert short[:3] == ["help", "config", "task"]


def test_options_that_help_leaves_out_are_refused_with_a_reason(call: Call) -> None:
    assert REFUSED_VALUES.keys() == REFUSED.keys()
    for name, value in REFUSED_VALUES.items():
        ended = call(fit.main, f"--trainer.{name}={value}")
        assert ended.code == 2
        what, hint = ended.err.splitlines()
        assert what.startswith(f"error: trainer.{name}: ")
        assert REFUSED[name][1] in what
        assert hint == f"  help: {REFUSED[name][2]}"


def test_a_cached_help_is_the_same_and_loads_no_library(call: Call, cache: Path, tmp_path: Path) -> None:
    first = call(commands.main, "fit", "--task=agent", "--help")
    assert call(commands.main, "fit", "--help").out != first.out  # of another task
    code = f"""
import sys
from proactive.commands import start
sys.argv[1:] = ["fit", "--config=agent/tiny", "--help"]
try:
    start()
finally:
    print([name for name in {HEAVY} if name in sys.modules])
"""
    again = python(code, tmp_path, XDG_CACHE_HOME=str(cache.parents[1]), COLUMNS="200").stdout
    assert again.replace("usage: proactive fit", "usage: command") == (
        first.out.replace("usage: proactive fit", "usage: command") + "[]\n"
    )


@pytest.mark.parametrize("change", ["damaged", "of other sources", "unwritable"])
def test_an_unusable_cache_is_not_used(change: str, call: Call, cache: Path) -> None:
    expected = call(fit.main, "--help").out
    file = cache / "fit-short-reward.json"
    kept = json.loads(file.read_text())
    kept["groups"] = []
    file.write_text(json.dumps(kept))
    assert call(commands.main, "fit", "--help").out != expected  # it is what is shown
    if change == "damaged":
        file.write_text(file.read_text()[:-20])
    elif change == "of other sources":
        file.write_text(json.dumps({**kept, "digest": "another"}))
    else:
        os.environ["XDG_CACHE_HOME"] = "/proc/nowhere"
    ended = call(commands.main, "fit", "--help")
    assert (ended.code, ended.out, ended.err) == (0, expected, "")


def test_only_commands_with_heavy_parsers_cache_their_help(call: Call, cache: Path) -> None:
    assert set(HELP_IS_CACHED) == {"fit", "plan"}
    assert call(commands.main, "inspect", "--help").code == 0
    assert not cache.exists()
