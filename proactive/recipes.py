"""The recipes that come with the project, each by its name: reward/tiny is configs/reward/tiny.yaml."""

import os
from pathlib import Path

from datamodules.errors import UserError
from proactive.parser import did_you_mean

_IN_A_WHEEL = Path(__file__).parent / "configs"
FOLDER = _IN_A_WHEEL if _IN_A_WHEEL.is_dir() else Path(__file__).parents[1] / "configs"


def recipe_names() -> list[str]:
    """The names that --config takes, such as reward/tiny."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def config_file(given: str) -> str:
    """What a configuration that is given by path or by name is read from; YAML itself stays what it is.

    A file by the path counts before a recipe by the name, with or without .yaml.

    Raises:
        UserError: There is neither.
    """
    if "\n" in given or ":" in given or (os.path.lexists(given) and not os.path.isdir(given)):
        return given
    names, name = recipe_names(), given.removesuffix(".yaml")
    if name in names:
        return str(FOLDER / f"{name}.yaml")
    if os.path.isdir(given):
        raise UserError(f"--config: {given} is a folder", f"Give a file, or a recipe: {', '.join(names)}.")
    raise UserError(
        f"--config: there is no file and no recipe {given}{did_you_mean(name, names)}",
        f"Give the path of a file, or a recipe: {', '.join(names)}.",
    )
