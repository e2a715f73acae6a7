"""Limits for a configuration that the user did not give: the config.yaml of a run folder that is resumed.

With --config, the user trusts all classes that the file names. On a resume, the run folder may come from someone else.
So options that could run code or read another configuration are refused before anything is imported.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.errors import UserError

# Classes that the configuration of a resumed run may name. None takes a function as an argument.
ALLOWED_CLASSES = frozenset(
    [
        "callbacks.fully_sharded.FullySharded",
        "lightning.pytorch.callbacks.DeviceStatsMonitor",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "lightning.pytorch.callbacks.ModelSummary",
        "lightning.pytorch.callbacks.RichModelSummary",
        "lightning.pytorch.callbacks.RichProgressBar",
        "lightning.pytorch.callbacks.Timer",
        "lightning.pytorch.callbacks.TQDMProgressBar",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.strategies.DDPStrategy",
        "lightning.pytorch.strategies.SingleDeviceStrategy",
    ]
)
GROUPS = ("model", "data", "trainer", "run")
BY_CLASS = (
    "callbacks",
    "logger",
    "plugins",
    "profiler",
    "strategy",
    "accelerator",
)  # trainer options that take classes
BY_NAME = ("profiler", "strategy", "accelerator")  # of these, options that also take a plain name
ANY_NAMES = (("model", "scratch"),)  # options that are mappings with any keys
_IMPORT_PATH = re.compile(r"\w+(\.\w+)+")
Where = tuple[str, ...]  # the keys that lead to a value


def refuse_foreign(path: Path, content: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Check the configuration of a resumed run.

    Args:
        path: Path of the file.
        content: Its options.
        arguments: The command line.

    Returns:
        The options without those trainer options that the command line replaces.

    Raises:
        UserError: An option could run code, or a key is not an option.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    rest = dict(content)
    if isinstance(rest.get("trainer"), Mapping):
        rest["trainer"] = {name: value for name, value in rest["trainer"].items() if f"--trainer.{name}" not in given}
    for where, value in _values(rest, ()):
        if problem := _problem(where, value, given):
            name = f"{'.'.join(where)}: " if where else ""
            raise UserError(
                f"{path}: {name}{problem}",
                f"If you trust the classes in this file, give it with --config {path}; else give the option.",
            )
    return rest


def _values(content: Any, where: Where) -> Iterator[tuple[Where, Any]]:
    """A value, and all values within it."""
    yield where, content
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _values(value, (*where, str(name)))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _values(value, (*where, str(number)))


def _problem(where: Where, value: Any, given: set[str]) -> str | None:
    takes_class = len(where) > 1 and where[0] == "trainer" and where[1] in BY_CLASS
    if isinstance(value, Mapping):
        odd = [name for name in value if not isinstance(name, str) or not name.isidentifier()]
        if odd and where[:2] not in ANY_NAMES:
            return f"{odd[0]} is not an option"
        if "class_path" in value and where[:2] not in ANY_NAMES and (not takes_class or "init_args" in where):
            return "this option takes no class"
        return None
    if len(where) == 1 and where[0] in GROUPS:
        return f"expected options, got {value}"
    if where == ("config",):
        return "a configuration cannot name another one"
    if where[-1:] == ("trust_remote_code",) and value and f"--{'.'.join(where)}" not in given:
        return "only the command line can allow to run code of the backbone"
    if where == ("model", "adapter") and isinstance(value, str):
        return "this option takes no class"
    if takes_class and isinstance(value, str):
        return _problem_of_name(where, value)
    return None


def _problem_of_name(where: Where, value: str) -> str | None:
    """The problem with a text in a trainer option that takes classes; None if it is allowed."""
    if where[-1] == "class_path":
        return None if value in ALLOWED_CLASSES else f"{value} is not a class that a resume loads without --config"
    if "init_args" in where:
        return f"{value} may name code" if _IMPORT_PATH.fullmatch(value) else None
    if where[1] in BY_NAME and len(where) == 2 and value.isidentifier():
        return None
    return f"{value} may name a class that a resume does not load without --config"
