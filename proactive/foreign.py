"""What a configuration may hold that is read unasked: on a resume, config.yaml of the run folder, which may be foreign.

A person who gives a configuration with --config has asked for all that it names. On a resume nobody has, so what could
run code, or read another file of options, is refused before anything of it is imported.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.errors import UserError

# The classes that a configuration read unasked may name. They count, show, stop, log to the disk, and spread weights;
# none takes a function.
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
BY_CLASS = ("callbacks", "logger", "plugins", "profiler", "strategy", "accelerator")  # of the trainer: take classes
BY_NAME = ("profiler", "strategy", "accelerator")  # of those: take a plain name as well
ANY_NAMES = (("model", "scratch"),)  # options whose mapping has names that are nobody's options
_IMPORT_PATH = re.compile(r"\w+(\.\w+)+")
Where = tuple[str, ...]  # the names on the way to a value


def refuse_foreign(path: Path, content: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Check a configuration that is read unasked.

    Args:
        path: Where it was read from.
        content: What it says.
        arguments: The command line. What it gives in whole takes the place of the file's.

    Returns:
        The configuration, without those options of the trainer that the command line gives in whole.

    Raises:
        UserError: It holds what could run code, or what is no option.
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
                f"If you trust all that the file names, give it yourself: --config {path}; else give the option.",
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
            return f"{odd[0]} is no name of an option"
        if "class_path" in value and where[:2] not in ANY_NAMES and (not takes_class or "init_args" in where):
            return "no class can be given here"
        return None
    if len(where) == 1 and where[0] in GROUPS:
        return f"expected options, got {value}"
    if where == ("config",):
        return "one file does not name another"
    if where[-1:] == ("trust_remote_code",) and value and f"--{'.'.join(where)}" not in given:
        return "code of the backbone is run only where the command line says so"
    if where == ("model", "adapter") and isinstance(value, str):
        return "no class can be given here"
    if takes_class and isinstance(value, str):
        return _problem_of_name(where, value)
    return None


def _problem_of_name(where: Where, value: str) -> str | None:
    """What a text may not be in an option of the trainer that takes classes."""
    if where[-1] == "class_path":
        return None if value in ALLOWED_CLASSES else f"{value} is not among the classes that are loaded unasked"
    if "init_args" in where:
        return f"{value} may name code" if _IMPORT_PATH.fullmatch(value) else None
    if where[1] in BY_NAME and len(where) == 2 and value.isidentifier():
        return None
    return f"{value} may name a class that is not loaded unasked"
