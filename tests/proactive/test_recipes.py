"""Recipes by name, from anywhere; paths count before names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from proactive import fit, plan
from proactive.recipes import config_file, recipe_names
from tests.helpers import ROOT
from tests.proactive.conftest import Ended

FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def test_every_file_in_configs_has_a_name() -> None:
    names = [path.relative_to(ROOT / "configs").as_posix().removesuffix(".yaml") for path in FILES]
    assert recipe_names() == sorted(names)
    assert [config_file(name) for name in names] == [config_file(f"{name}.yaml") for name in names]
    assert [Path(config_file(name)) for name in names] == FILES


@pytest.mark.parametrize("module", [fit, plan])
@pytest.mark.parametrize("given", [["--config=agent/tiny"], ["--config", "agent/tiny.yaml"], ["-c", "agent/tiny"]])
def test_a_recipe_by_name_is_its_file(module: Any, given: list[str], call: Callable[..., Ended]) -> None:
    ended = call(module.main, *given, "--print_config")
    assert (ended.code, ended.err) == (0, "")
    assert yaml.safe_load(ended.out)["task"] == "agent"  # read before the options of a task are known
    assert ended.out == call(module.main, f"--config={ROOT / 'configs/agent/tiny.yaml'}", "--print_config").out


def test_a_file_at_the_path_has_priority_over_a_recipe(call: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "reward/tiny").mkdir(parents=True)
    (tmp_path / "configs/reward").mkdir(parents=True)
    (tmp_path / "configs/reward/tiny.yaml").write_text("data: {seed: 6}\n")  # no path that was given
    printed = yaml.safe_load(call(fit.main, "--config=reward/tiny", "--print_config").out)
    assert (printed["run"]["name"], printed["data"]["seed"]) == ("reward-tiny", 0)
    (tmp_path / "reward/tiny.yaml").write_text("data: {seed: 5}\n")
    (tmp_path / "reward/paper").write_text("data: {seed: 7}\n")
    for given, seed in (("reward/tiny.yaml", 5), ("reward/paper", 7), ("configs/reward/tiny.yaml", 6)):
        assert yaml.safe_load(call(fit.main, f"--config={given}", "--print_config").out)["data"]["seed"] == seed


@pytest.mark.parametrize("given", ["reward/tinny", "nowhere.yaml", "."])
def test_an_unknown_recipe_lists_the_recipes(given: str, call: Callable[..., Ended]) -> None:
    ended = call(fit.main, f"--config={given}")
    assert ended.code == 2
    error, help_line = ended.err.splitlines()
    assert given in error
    assert help_line.endswith(f"or a recipe: {', '.join(recipe_names())}.")
