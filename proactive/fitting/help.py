"""The help of `fit` and `plan`. It is kept in a cache, because the parser that it describes imports all libraries.

The key of the cache is a digest of this project's sources and of the versions of the libraries that define options, so
a kept help lists the options of the installed versions.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from pydantic import BaseModel

from datamodules.errors import UserError
from datamodules.files.writing import write_atomically
from proactive.fitting.arguments import named_task

ALL = "all"
LIBRARIES = ("lightning", "torch", "transformers", "jsonargparse")
PACKAGES = ("proactive", "callbacks", "models", "datamodules")
COMMON = (
    *("help", "config", "task", "data.root", "data.split", "data.fold", "folds", "data.max_length", "data.batch_size"),
    *("model.backbone", "model.dtype", "model.learning_rate", "model.adapter"),
    *("trainer.max_epochs", "trainer.max_steps", "trainer.accelerator", "trainer.devices", "trainer.strategy"),
    *("trainer.precision", "run.name", "ckpt_path", "devices", "device", "memory"),
)
SHORTER = {  # than Lightning's help, for the short help
    "trainer.max_epochs": "Maximum number of epochs; -1 for no limit.",
    "trainer.max_steps": "Maximum number of optimizer steps; -1 for no limit.",
    "trainer.accelerator": "cpu, gpu, or auto.",
    "trainer.devices": "Number of devices, or a list of their numbers.",
    "trainer.strategy": "How devices share the work: auto, ddp, or fully_sharded (FSDP2).",
    "trainer.precision": "Dtype of computation: 32-true, bf16-mixed, bf16-true, 16-mixed.",
}
COMMON_TITLE, OTHER_TITLE = "Common options", "Run"
MORE = "--help=all also lists the options of Lightning's trainer, and the type and range of each option."


class HelpOption(BaseModel):
    """One option: its names, the word for its value (None for a flag), and its explanation."""

    names: list[str]
    value: str | None
    text: str


class HelpGroup(BaseModel):
    """Options under a title."""

    title: str
    options: list[HelpOption]


class Help(BaseModel):
    """The help of a command, and the digest of what it was made from."""

    digest: str
    groups: list[HelpGroup]


class HelpAction(argparse.Action):
    """The option --help: prints the common options and those of this project; --help=all prints all options.

    Args:
        command: The name of the command.
        task: The name of its task.
    """

    def __init__(self, option_strings: list[str], dest: str, command: str, task: str, help: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", choices=(ALL,), default=argparse.SUPPRESS, help=help)
        self.command = command
        self.task = task

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        everything = values == ALL
        shown = Help(digest=_digest(), groups=_groups(parser, everything))
        with contextlib.suppress(UserError, OSError, RuntimeError):  # without a cache, the next call takes as long
            write_atomically(_cached_file(self.command, self.task, everything), shown.model_dump_json())
        _show(shown, parser.prog)
        parser.exit()


def show_cached_help(command: str, program: str, arguments: list[str]) -> bool:
    """Print the help from the cache, if the arguments ask for it and the cache contains it.

    Args:
        command: The name of the command.
        program: How the command was started.
        arguments: The command line.

    Returns:
        Whether it was printed.

    Raises:
        UserError: A configuration among the arguments cannot be read.
    """
    everything = f"--help={ALL}" in arguments
    if not everything and not {"-h", "--help"}.intersection(arguments):
        return False
    try:
        task = named_task(arguments)
        kept = Help.model_validate_json(_cached_file(command, task, everything).read_bytes())
    except (OSError, RuntimeError, ValueError):  # missing, or damaged; it is made again
        return False
    if kept.digest != _digest():
        return False
    _show(kept, program)
    return True


def _cached_file(command: str, task: str, everything: bool) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "proactive", "help")
    return folder / f"{command}-{ALL if everything else 'short'}-{task}.json"


def _digest() -> str:
    """A digest of the sources of this project, and of the versions of the libraries that define options."""
    versions = [sys.version, *(importlib.metadata.version(name) for name in LIBRARIES)]
    digest = hashlib.sha256(json.dumps(versions).encode())
    for package in PACKAGES:
        for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _groups(parser: ArgumentParser, everything: bool) -> list[HelpGroup]:
    """The options of a parser in groups, the common ones first."""
    actions = {
        action.dest: (group.title or "", action)
        for group in parser._action_groups
        for action in group._group_actions
        if action.help != argparse.SUPPRESS and all(name.startswith("-") for name in action.option_strings)  # no links
    }
    found = {COMMON_TITLE: [actions[name][1] for name in COMMON if name in actions]}
    for name, (title, action) in actions.items():
        if name not in COMMON and (everything or not name.startswith("trainer")):
            found.setdefault(OTHER_TITLE if title == "options" else title, []).append(action)
    describe = parser._get_formatter()._expand_help if everything else _short_help
    return [
        HelpGroup(
            title=title,
            options=[
                HelpOption(names=action.option_strings, value=_value(action), text=describe(action)) for action in group
            ],
        )
        for title, group in found.items()
    ]


def _value(action: argparse.Action) -> str | None:
    """The word for an option's value, such as NAME or {a,b}; None for a flag."""
    if action.nargs == 0:
        return None
    metavar = action.metavar or (action.choices and f"{{{','.join(map(str, action.choices))}}}")
    word = str(metavar or action.dest.rpartition(".")[2].upper())
    return f"[{word}]" if action.nargs == "?" else word


def _short_help(action: argparse.Action) -> str:
    """The explanation of an option with its default."""
    text = SHORTER.get(action.dest, action.help or "")
    if action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
        return text
    shown = action.default if isinstance(action.default, str) else json.dumps(action.default)
    return f"{text} (default: {shown})"


def _show(shown: Help, program: str) -> None:
    """Print a help in the width of the terminal."""
    parser = argparse.ArgumentParser(
        program, f"{program} [-c CONFIG] [--OPTION VALUE ...]", add_help=False, epilog=MORE
    )
    for group in shown.groups:
        into = parser.add_argument_group(group.title)
        for option in group.options:
            into._group_actions.append(
                argparse.Action(
                    option.names,
                    dest="",
                    nargs=None if option.value else 0,
                    metavar=option.value,
                    help=option.text.replace("%", "%%"),
                )
            )
    print(parser.format_help(), end="")
