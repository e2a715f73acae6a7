"""The command `proactive` and the table of its commands.

A command is a module of this package with a function `main(arguments)`. `python -m proactive.NAME` starts it too.
"""

import importlib
import sys
from typing import NoReturn

from datamodules.errors import UserError, did_you_mean
from proactive import __version__
from proactive.fitting.help import show_cached_help
from proactive.terminal import quiet_imports, run, say

COMMANDS = {  # module name: description
    "fit": "train a reward classifier or an agent, and test it",
    "evaluate": "measure trained and recorded models, next to published metrics",
    "compare": "compare runs and evaluations on the rows that they have all tested",
    "inspect": "print statistics of data, and how contaminated its splits are",
    "plan": "estimate the memory and time of a run, without running it",
    "export": "write the weights of a run as a folder that transformers loads",
    "annotate": "label offers, compute the agreement of annotators, and read traces",
    "simulate": "create training data with simulated users, assistants and judges",
    "prefer": "create preferences from a judge's verdicts on several answers",
    "live": "observe events, offer help, and log the user's answers",
    "gate": "calibrate a gate on the answers of its user",
    "completion": "print a script for completion of commands and options in bash or zsh",
}
HELP_IS_CACHED = ("fit", "plan")  # because their parsers import all libraries
HELP = "\n".join(
    [
        "usage: proactive COMMAND [OPTION ...]",
        "       proactive --version",
        "",
        "commands (each has --help):",
        *(f"  {name:<{max(map(len, COMMANDS)) + 2}}{does}" for name, does in COMMANDS.items()),
    ]
)


def start(command: str | None = None) -> NoReturn:
    """Run a command with the process's arguments, and exit; if None, the first argument names the command."""
    run(lambda arguments: main([command, *arguments] if command else arguments))


def program(command: str) -> str:
    """Return how a command was started, for its help: `proactive fit` or `python -m proactive.fit`."""
    spec = sys.modules["__main__"].__spec__
    by_module = spec is not None and spec.name == f"proactive.{command}"
    return f"python -m proactive.{command}" if by_module else f"proactive {command}"


def main(arguments: list[str]) -> None:
    """Run the command that the first argument names."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
    elif name == "--version":
        say(f"proactive {__version__}")
    elif name in COMMANDS:
        if name in HELP_IS_CACHED and show_cached_help(name, program(name), rest):
            return
        with quiet_imports():
            command = importlib.import_module(f"proactive.{name}")
        command.main(rest)
    else:
        raise UserError(f"there is no command {name}{did_you_mean(name, COMMANDS)}", "See proactive --help.")


if __name__ == "__main__":
    start()
