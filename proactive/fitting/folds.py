"""Cross-validation: a run for each fold, each in a process of its own, and the comparison of all of them.

The folder of a cross-validation holds folds.yaml with the options, a folder for each fold with its run, such as
fold-0/0, and the files of the comparison. Nothing else is stored: which folds are finished follows from their folders.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from jsonargparse import Namespace

from callbacks.stopping import SIGNALS
from callbacks.watch_ranks import PARENT_VARIABLE
from datamodules.errors import UserError
from datamodules.files.run_folders import (
    CONFIG_FILE,
    FOLD_PLACEHOLDER,
    FOLDS_FILE,
    METRICS_FILE,
    RunLock,
    holds_folds,
    latest_run_folder,
    missing_folders,
    new_run_folder,
    remove_empty,
)
from datamodules.files.safe_yaml import read_yaml
from datamodules.files.writing import write_atomically
from models.learning.checkpoint_paths import holds_export
from proactive.commands import program
from proactive.comparing.comparison import compare
from proactive.comparing.folders import find_folders
from proactive.comparing.output import comparison_tables, write_comparison
from proactive.comparing.runs import read_options
from proactive.fitting.arguments import FOLDS
from proactive.fitting.cli import FitCLI
from proactive.fitting.configs import all_options, task_of
from proactive.fitting.resume import refuse_changed_options, resumed_folder
from proactive.tables import show
from proactive.terminal import say

LENGTH = ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")  # a fold of another length is not finished
OF_OTHER_RUNS = ("backbone", "judge", "held_out_judge")  # options of the model that may name a run of the same fold


class FoldsCLI(FitCLI):
    """The options of a cross-validation, without model, data, trainer and run folder."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def after_instantiate_classes(self) -> None: ...


def cross_validate(arguments: list[str]) -> None:
    """Train and test all folds that are not finished, compare them, and print the folder.

    Args:
        arguments: The command line of `fit`, with the configuration of the cross-validation that it continues.

    Raises:
        UserError: The options cannot be used for several folds.
        SystemExit: A fold has failed, or a signal has ended it; with the exit code of its process.
    """
    cli = FoldsCLI(task_of(arguments), arguments)
    config = cli.config
    folds = chosen_folds(config)
    _refuse_impossible(config)
    resumed = resumed_folder(config.run.root, config.run.name, config.ckpt_path)
    if resumed is not None and not holds_folds(resumed):
        raise UserError(
            f"--ckpt_path: {resumed} is a single run, and --folds trains several",
            "Give the folder of a cross-validation, or leave --folds out.",
        )
    new_folders = missing_folders(Path(config.run.root, config.run.name))
    folder = resumed or new_run_folder(Path(config.run.root), config.run.name)
    options = all_options(cli.parser, config) | {FOLDS: config[FOLDS]}
    if resumed is not None:
        refuse_changed_options(read_options(resumed / FOLDS_FILE), options, cli.task.module, resumed)
    processes = FoldProcesses(folder, options, quiet=config.quiet, debug=config.debug)
    write_atomically(folder / FOLDS_FILE, yaml.safe_dump(options, sort_keys=False))
    for number, fold in enumerate(folds, 1):
        if code := processes.train(fold, f"fold {fold} ({number} of {len(folds)})"):
            _say_how_to_resume(folder, fold, new_folders if resumed is None else None)
            raise SystemExit(code)
    record, settings = compare(find_folders([folder]), contaminated=True)
    write_comparison(record, settings, folder)
    if not config.quiet:
        show(*comparison_tables(record))
    say(folder)


def chosen_folds(config: Namespace) -> list[int]:
    """The folds of the option --folds: all, or numbers with commas between them.

    Raises:
        UserError: It is neither, or there is no such fold.
    """
    given, count = str(config[FOLDS]).strip(), config.data.folds
    if config.data.split != "by_scene":
        raise UserError(f"--folds: split {config.data.split} has no folds", "Use --data.split by_scene.")
    if given == "all":
        return list(range(count))
    numbers = [part.strip() for part in given.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in numbers):
        raise UserError(f"--folds: expected all, or numbers such as 0,2,4, got {given}", "Give --folds all.")
    folds = sorted(set(map(int, numbers)))
    if folds[-1] >= count:
        raise UserError(f"--folds: there is no fold {folds[-1]} of {count}", f"Use 0 to {count - 1}, or --data.folds.")
    return folds


def _refuse_impossible(config: Namespace) -> None:
    tasks = int(os.environ.get("SLURM_NTASKS", 1)) if "SLURM_PROCID" in os.environ else 1
    if "TORCHELASTIC_RUN_ID" in os.environ or tasks > 1 or config.trainer.num_nodes > 1:
        raise UserError(
            "--folds: torchrun, SLURM and several nodes start one run at a time",
            "Start a run for each fold with --data.fold 0, --data.fold 1, ..., then python -m proactive.compare.",
        )
    for name in OF_OTHER_RUNS:
        value = config.model.get(name)
        if isinstance(value, str) and FOLD_PLACEHOLDER not in value and _trained_here(Path(value)):
            raise UserError(
                f"--folds: model.{name} {value} is of a single run, which was trained on scenes that other folds test",
                f"Give the one of each fold; {FOLD_PLACEHOLDER} becomes its number: "
                f"--model.{name} 'runs/NAME/0/fold-{FOLD_PLACEHOLDER}/0{'/export' if name == 'backbone' else ''}'",
            )


def _trained_here(path: Path) -> bool:
    """Whether a path holds a run or an export of this project."""
    return holds_export(path) or (path / CONFIG_FILE).is_file()


class FoldProcesses:
    """Runs the processes of folds, one after the other.

    Args:
        folder: The folder of the cross-validation.
        options: All options, as in folds.yaml.
        quiet: Whether the processes print nothing.
        debug: Whether they print tracebacks.
    """

    def __init__(self, folder: Path, options: dict[str, Any], quiet: bool, debug: bool) -> None:
        self.folder = folder
        self.lock = RunLock(folder)
        self.options = options
        self.quiet = quiet
        self.debug = debug
        self._signal = 0
        self._process: subprocess.Popen[Any] | None = None

    def train(self, fold: int, label: str) -> int:
        """Train and test a fold unless it is finished. Returns the exit code; that of a signal is 128 + its number."""
        name = f"fold-{fold}"
        started = (self.folder / name).is_dir() and any(self.folder.joinpath(name).glob(f"*/{CONFIG_FILE}"))
        if started and self._is_finished(latest_run_folder(self.folder, name)):
            self._say(f"{label}: finished before")
            return 0
        self._say(f"{label}: {'resumes' if started else 'starts'}")
        text = yaml.safe_dump({**self.options, FOLDS: None}, sort_keys=False).replace(FOLD_PLACEHOLDER, str(fold))
        arguments = ["--config", text, f"--data.fold={fold}", f"--run.root={self.folder}", f"--run.name={name}"]
        arguments += ["--ckpt_path=last"] * started + ["--quiet"] * self.quiet + ["--debug"] * self.debug
        return self._run(arguments)

    def _is_finished(self, folder: Path) -> bool:
        if not (folder / METRICS_FILE).exists():
            return False
        trainer = read_yaml(folder / CONFIG_FILE)["trainer"]
        return all(trainer.get(name) == self.options["trainer"].get(name) for name in LENGTH)

    def _run(self, arguments: Sequence[str]) -> int:
        """Run a process to its end. Signals are passed on to it, so it saves and ends as a single run does."""
        safe_path = [] if program("fit").startswith("python") else ["-P"]  # as this process was started
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the command is ours
                [sys.executable, *safe_path, "-m", "proactive.fit", *arguments],
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
                stdout=subprocess.DEVNULL if self.quiet else None,
                start_new_session=True,  # Ctrl-C reaches it once, from here
            )
            if self._signal:  # it came before there was a process
                self._process.send_signal(self._signal)
            code = self._process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signal:
            return 128 + self._signal
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self._process is not None:
            self._process.send_signal(number)

    def _say(self, text: str) -> None:
        if not self.quiet:
            say(text)
            sys.stdout.flush()  # before the process prints


def _say_how_to_resume(folder: Path, fold: int, new_folders: Sequence[Path] | None) -> None:
    """Print the command that resumes. If no fold has begun, remove the folder and the parents that are new."""
    if new_folders is not None and not any(folder.glob("fold-*/*")):
        shutil.rmtree(folder, ignore_errors=True)
        remove_empty(new_folders)
    else:
        say(f"stopped in fold {fold}; resume with: python -m proactive.fit --ckpt_path {shlex.quote(str(folder))}")
