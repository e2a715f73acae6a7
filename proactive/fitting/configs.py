"""Configurations: files, recipes, and the config.yaml of a run that is resumed."""

import argparse
import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from datamodules.errors import UserError
from datamodules.files.run_folders import CONFIG_FILE
from datamodules.files.safe_yaml import NotYamlError, parse_yaml, read_yaml
from proactive.fitting.foreign import GROUPS, refuse_foreign
from proactive.fitting.resume import resumed_folder
from proactive.parser import did_you_mean
from proactive.recipes import config_file, recipe_names
from proactive.tasks import DEFAULT_TASK, TASKS

NOT_IN_CONFIG = ("config", "ckpt_path", "quiet", "debug")  # options of one call, not of the run


class MergedConfigs(ActionConfigFile):
    """The --config option. A later configuration changes single fields of a mapping, as the command line does."""

    @staticmethod
    def apply_config(parser: LightningArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        before = cfg.clone()
        ActionConfigFile.apply_config(parser, cfg, dest, config_file(value))
        for name, mapping in cfg.items():
            if isinstance(mapping, dict) and isinstance(before.get(name), dict):
                cfg[name] = _merged(before[name], mapping)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge nested mappings. Fields of the second override those of the first."""
    both = {
        name: _merged(first[name], value)
        for name, value in second.items()
        if isinstance(value, dict) and isinstance(first.get(name), dict)
    }
    return {**first, **second, **both}


def task_of(arguments: list[str]) -> str:
    """The task to train: from --task, else from the last configuration that names one, else the default.

    Raises:
        UserError: There is no such task, or a configuration cannot be read.
    """
    found = _scan(arguments)
    named = [_read_config(config).get("task") for config in found.config]
    task = found.task or next((task for task in reversed(named) if task), DEFAULT_TASK)
    if task not in list(TASKS):  # a list, because a configuration may give an unhashable value
        raise UserError(f"task: there is no task {task}{did_you_mean(str(task), TASKS)}", f"Use {' or '.join(TASKS)}.")
    return task


def with_config_of_resumed_run(arguments: list[str]) -> list[str]:
    """Put the configuration of the run to resume first, unless the arguments give a configuration.

    Raises:
        UserError: There is no such run, or its configuration could run code; see `refuse_foreign`.
    """
    found = _scan(arguments)
    if found.ckpt_path is None or found.config:
        return arguments
    folder = resumed_folder(found.root, found.name or found.task or DEFAULT_TASK, found.ckpt_path)
    config = folder / CONFIG_FILE if folder else None
    if config is None or not config.is_file():
        return arguments
    content = refuse_foreign(config, _read_config(str(config)), arguments)
    return ["--config", yaml.safe_dump(content, sort_keys=False), *arguments]


def _scan(arguments: list[str]) -> argparse.Namespace:
    """Parse only the options that determine which other options there are."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--task")
    scan.add_argument("--ckpt_path")
    scan.add_argument("--config", "-c", action="append", default=[])
    scan.add_argument("--run.root", dest="root", default="runs")
    scan.add_argument("--run.name", dest="name")
    try:
        found, _ = scan.parse_known_args(arguments)
    except argparse.ArgumentError:  # the full parser reports the error
        found = scan.parse_args([])
    return found


def _read_config(given: str) -> dict[str, Any]:
    """The options of a configuration: a file, a recipe, or YAML text.

    Raises:
        UserError: It is not a YAML mapping of options, or there is no such file or recipe.
    """
    path = config_file(given)
    try:
        content = read_yaml(Path(path)) if os.path.lexists(path) else parse_yaml(path)
    except NotYamlError as error:
        raise UserError(
            f"--config: {given} is not YAML: {error}",
            f"Correct it, or start from a recipe: {', '.join(recipe_names())}.",
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"--config: {given} holds no options", f"Start from a recipe: {', '.join(recipe_names())}.")
    for group in GROUPS:
        if not isinstance(content.get(group, {}), dict):
            raise UserError(
                f"--config: {given}: {group}: expected options, got {content[group]!r}",
                "Give options, or remove the line.",
            )
    return content


def all_options(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """All options of a run as plain values, with their defaults."""
    content = parse_yaml(parser.dump(config, skip_unset=False, skip_validation=True))
    return {key: value for key, value in content.items() if key not in NOT_IN_CONFIG}
