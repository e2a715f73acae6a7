"""`python -m proactive.completion bash|zsh`: print the script that lets a shell complete commands, options and values.

The script contains all names, so completion is instant and does not start Python. Print it again after an update.
"""

if __name__ == "__main__":
    from proactive.commands import start

    start("completion")

import argparse
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import shtab

from proactive.commands import COMMANDS, program
from proactive.parser import Parser, parser_of
from proactive.recipes import recipe_names

SHELLS = ("bash", "zsh")
# A recipe by name, or a file.
RECIPES = {
    "bash": '_proactive_recipes() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "_proactive_recipes() {{ compadd -- {names}; _files }}",
}


def main(arguments: list[str]) -> None:
    """Parse, and print the script."""
    parser = _own_parser()
    options = parser.parse_args(arguments)
    recipes = RECIPES[options.shell].format(names=" ".join(recipe_names()))
    print(shtab.complete(_all_commands(), options.shell, preamble={options.shell: recipes}))  # type: ignore[arg-type]


def _own_parser() -> Parser:
    parser = Parser(prog=program("completion"), description="Print a script that completes commands and options.")
    parser.add_argument("shell", choices=SHELLS, help="Which shell is to read it.")
    return parser


def _all_commands() -> argparse.ArgumentParser:
    """Return an argparse parser with all commands and their options."""
    found = argparse.ArgumentParser("proactive")
    found.add_argument("--version", action="store_true", help="the version")
    commands = found.add_subparsers()
    for name, does in COMMANDS.items():
        main = importlib.import_module(f"proactive.{name}").main
        into = commands.add_parser(name, help=does)
        for arguments in ([], ["--task=agent"]) if name in ("fit", "plan") else ([],):
            _copy(parser_of(main, *arguments), into)
    return found


def _copy(parser: argparse.ArgumentParser, into: argparse.ArgumentParser) -> None:
    """Add the missing arguments of one parser to another."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = into.add_subparsers()
            for name, one in action._name_parser_map.items():
                _copy(one, commands.add_parser(name, help=one.description))
        elif action.help != argparse.SUPPRESS and all(name.startswith("-") for name in action.option_strings):
            _copy_argument(action, into)  # others are links between options


def _copy_argument(action: argparse.Action, into: argparse.ArgumentParser) -> None:
    choices = list(map(str, action.choices or _values(getattr(action, "_typehint", None))))
    known = next((into._option_string_actions.get(name) for name in action.option_strings), None)
    if known:
        known.choices = list(dict.fromkeys([*(known.choices or ()), *choices])) or None
        return
    copy = argparse.Action(action.option_strings, action.dest, action.nargs, choices=choices or None)
    copy.help = re.sub(r"[^\w ,/-]+", " ", (action.help or "").partition("\n")[0])  # markup of no use in a shell
    if not choices and (complete := _completes(action)):
        copy.complete = complete  # type: ignore[attr-defined]
    into._add_action(copy)


def _values(annotation: Any) -> Iterator[Any]:
    """Return the values of a type with few values."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif annotation is bool:
        yield from ("true", "false")
    else:
        for part in get_args(annotation):
            yield from _values(part)


def _completes(action: argparse.Action) -> Mapping[str, Any] | None:
    """Return the completion for the value of an option without choices: recipes, files, or nothing."""
    if "--config" in action.option_strings:
        return dict.fromkeys(SHELLS, "_proactive_recipes")
    annotation = getattr(action, "_typehint", action.type)
    return shtab.FILE if {str, Path} & {annotation, *get_args(annotation)} else None
