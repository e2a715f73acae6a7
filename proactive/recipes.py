"""The project's recipes by name: reward/tiny is configs/reward/tiny.yaml."""

import os
from pathlib import Path

from datamodules.errors import UserError, did_you_mean

_IN_A_WHEEL = Path(__file__).parent / "configs"
FOLDER = _IN_A_WHEEL if _IN_A_WHEEL.is_dir() else Path(__file__).parents[1] / "configs"


def recipe_names() -> list[str]:
    """Return the names of all recipes, such as reward/tiny."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def config_file(given: str) -> str:
    """The path of a configuration that is given by path or by name of a recipe. YAML text is returned unchanged.

    An existing file takes precedence over a recipe. The name of a recipe may end in .yaml.

    Raises:
        UserError: There is no such file or recipe.
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
