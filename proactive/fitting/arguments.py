"""What the command line says about a run before its parser exists. Imports no heavy library, so that help is quick."""

import argparse
import os
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from datamodules.files.safe_yaml import NotYamlError, parse_yaml, read_yaml
from proactive.fitting.foreign import GROUPS
from proactive.recipes import config_file, recipe_names

DEFAULT_TASK = "reward"
FOLDS = "folds"


def named_task(arguments: list[str]) -> Any:
    """The task that the arguments name: --task, else the last configuration that names one, else the default.

    Returns:
        The name. It may be that of no task, because configurations can contain anything.

    Raises:
        UserError: A configuration cannot be read.
    """
    found = scan(arguments)
    named = [read_config(config).get("task") for config in found.config]
    return found.task or next((task for task in reversed(named) if task), DEFAULT_TASK)


def trains_folds(arguments: list[str]) -> bool:
    """Whether --folds is given, on the command line or else by the last configuration that names it."""
    found = scan(arguments)
    named = [content[FOLDS] for config in found.config if FOLDS in (content := read_config(config))]
    given = found.folds if found.folds is not None else (named[-1] if named else None)
    return given not in (None, "null", "")


def scan(arguments: list[str]) -> argparse.Namespace:
    """Parse only the options that determine which other options there are."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--task")
    scan.add_argument("--ckpt_path")
    scan.add_argument("--folds")
    scan.add_argument("--config", "-c", action="append", default=[])
    scan.add_argument("--run.root", dest="root", default="runs")
    scan.add_argument("--run.name", dest="name")
    try:
        found, _ = scan.parse_known_args(arguments)
    except argparse.ArgumentError:  # the full parser reports the error
        found = scan.parse_args([])
    return found


def read_config(given: str) -> dict[str, Any]:
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
