"""How every command starts, speaks and ends: errors in one line each, tables."""

import contextlib
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from datamodules.errors import UserError
from datamodules.escaping import printable
from datamodules.files.writing import no_room
from proactive.environment import refuse_impossible_place
from proactive.parser import one_line

OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # of a stream, which has no name
MISTAKE = 2  # the exit code of a user's mistake
AGENT_FIGURES = ("recall", "precision", "accuracy", "false_alarm", "f1")


class Table(RichTable):
    """A table whose texts are shown as they are: none is markup, and a terminal obeys none."""

    def __init__(self, title: str, caption: str | Text | None = None, **options: Any) -> None:
        below = Text(printable(caption), style="table.caption") if isinstance(caption, str) else caption
        super().__init__(title=Text(printable(title), style="table.title"), caption=below, **options)

    def add_column(self, header: str = "", **options: Any) -> None:  # type: ignore[override]
        super().add_column(Text(printable(header)), **options)

    def add_row(self, *cells: str) -> None:  # type: ignore[override]
        super().add_row(*(Text(printable(cell)) for cell in cells))


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command's `main` on the process's arguments and exit: 0, or 2 after a user's mistake.

    With --debug among the arguments, exceptions show their traceback.
    """
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    _open_closed_streams()
    before = signal.signal(signal.SIGTERM, _end)
    try:
        refuse_impossible_place()  # before a command imports Lightning, which would end in a traceback
        set_up_messages(arguments)
        _refuse_no_text(arguments)
        main(arguments)
        sys.stdout.flush()  # what cannot be written is found now, and not while Python ends
    except SystemExit:
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output is gone
        _forget_output()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        mistake = as_user_error(error)
        if debug or mistake is None:
            raise
        rank = _rank()
        with contextlib.suppress(OSError):  # nobody can be told
            print(f"error{f' (rank {rank})' if rank else ''}: {mistake.what}", file=sys.stderr)
            print(f"  help: {mistake.hint}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _forget_output()
        sys.exit(MISTAKE)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(0)


def _open_closed_streams() -> None:
    """Point standard streams that the caller has closed to nowhere, so that no file takes their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))


def _forget_output() -> None:
    """Let what was not written yet go nowhere, for Python would try again while it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_no_text(arguments: list[str]) -> None:
    """Raise a UserError for an argument whose bytes are no text: no file that a run leaves could hold it."""
    for number, argument in enumerate(arguments, 1):
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise UserError(f"argument {number} is not UTF-8: {argument!a}", "Give names in UTF-8.")


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C, so that temporary files are removed."""
    sys.exit(128 + number)


def as_user_error(error: BaseException) -> UserError | None:
    """The user's mistake behind an exception, or None if it looks like one of ours."""
    if isinstance(error, UserError):
        return error
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from torch import OutOfMemoryError

    text = one_line(str(error))
    if isinstance(error, MemoryError):
        return UserError("out of memory, while data was read or prepared", "Give less data, or use a larger machine.")
    if isinstance(error, OutOfMemoryError) or "can't allocate memory" in text:
        return UserError(
            f"out of memory: {text}",
            "Lower data.token_budget (layout rows: data.micro_batch_size), or set model.gradient_checkpointing.",
        )
    if isinstance(error, MisconfigurationException):
        return UserError(text, "Change the trainer's options; see --help.")
    if reason := no_room(error):
        return UserError(f"the disk is full: {reason}", "Make room there; what was written before is intact.")
    if isinstance(error, OSError) and error.filename:
        return UserError(
            f"{error.filename}: {error.strerror}", "Check the path, its permissions and the room on the disk."
        )
    if isinstance(error, OSError) and error.errno in OUTPUT_ERRORS:
        return UserError(
            f"what is written out: {error.strerror}", "Check where standard output goes, and the room on the disk."
        )
    return None


def reward_tables(record: dict[str, Any]) -> list[Table]:
    """What the test of a reward classifier found out."""
    return [_judge_table(record), _agreement_table(record)]


def decision_tables(record: dict[str, Any]) -> list[Table]:
    """What the test of an agent found out: its decisions to propose."""
    table = Table(
        title=f"{_tested(record)}: the decision to propose after {record['test']['raw']['histories']:.0f} histories",
        caption=_caption(record),
    )
    names = (
        *("accuracy", "precision", "recall", "f1", "auroc", "proposed", "help_needed"),
        *("loss", "loss_text", "loss_null"),
    )
    table.add_column("agent")
    for name in names:
        table.add_column(name.replace("_", " " if name == "help_needed" else ", "), justify="right")

    def add(label: str, figures: dict[str, float]) -> None:
        cells = (f"{figures[n]:.4f}{_interval(figures, n)}" if n in figures else "" for n in names)
        table.add_row(label, *cells)

    for reading, label in record["readings"].items():
        figures = record["test"][reading]
        add(f"this model, {label}", figures)
    table.add_section()
    for name, figures in record["baselines"].items():
        add(name, figures)
    return [table]


def _tested(record: dict[str, Any]) -> str:
    """What was tested, with the number of rows that the figures are of."""
    used, rows = record["tested_rows"], record["rows"]["test"]
    return f"{record['split']}: {used if used == rows else f'{used} of {rows}'} test rows"


def _judge_table(record: dict[str, Any]) -> Table:
    """A tested classifier's figures, with intervals, beside people and the published rows."""
    test = record["test"]
    table = Table(
        title=_tested(record),
        caption=_caption(record, *["published rows: the same rows"] * bool(record["published"])),
    )
    for title in ("judge", "accuracy", "precision", "recall", "F1", "AUROC", "calibration error", "accepts"):
        table.add_column(title, justify="left" if title == "judge" else "right")

    def add(label: str, figures: dict[str, float]) -> None:
        table.add_row(
            label,
            *(f"{figures[key]:.4f}{_interval(figures, key)}" for key in ("accuracy", "precision", "recall", "f1")),
            *(f"{figures[key]:.4f}" for key in ("auroc", "calibration_error", "acceptance_rate")),
        )

    for name, label in record["readings"].items():
        add(f"this model, {label}", test[name])
    table.add_row("people", *[""] * 6, f"{test['raw']['people_acceptance_rate']:.4f}")
    table.add_section()
    for name, figures in record["baselines"].items():
        add(name, figures)
    table.add_section()
    for name, figures in record["published"].items():
        shown = (f"{figures[key]:.4f}" if key in figures else "" for key in ("accuracy", "precision", "recall", "f1"))
        table.add_row(name, *shown)
    return table


def _agreement_table(record: dict[str, Any]) -> Table:
    """The share of right decisions within each category."""
    table = Table(title="Agreement within each category")
    names = [name for name in record["test"]["raw"] if name.startswith("agreement_")]
    table.add_column("judge")
    for name in names:
        table.add_column(name.removeprefix("agreement_").replace("_", " "), justify="right")
    for reading, label in record["readings"].items():
        table.add_row(label, *(f"{record['test'][reading][name]:.4f}" for name in names))
    return table


def agent_tables(record: dict[str, Any]) -> list[Table]:
    """An agent's figures beside baselines and published rows, then by split and by number of candidates."""
    published = ["published rows: their own judge, on 227 events"] * bool(record["published"])
    table = Table(title="Agent", caption=_caption(record, *published))
    splits = Table(title="By split")
    candidates = Table(title="By number of candidates")
    for one in (table, splits, candidates):
        one.add_column("agent" if one is table else "")
        for title in ("recall", "precision", "accuracy", "false alarm", "F1", "TP/FP/TN/FN", "events"):
            one.add_column(title, justify="right")

    def add(to: Table, name: str, found: dict[str, float]) -> None:
        cells = [f"{found[key]:.4f}" for key in AGENT_FIGURES]
        cells[-1] += _interval(found, "f1")
        counts = "/".join(str(int(found[key])) for key in ("tp", "fp", "tn", "fn"))
        to.add_row(name, *cells, counts, str(int(found["events"])))

    add(table, "this agent", record["figures"])
    if record["gate"]:
        add(table, "this agent, without gate", record["gate"]["without_gate"])
    for name, found in record["baselines"].items():
        add(table, name, found)
    table.add_section()
    for name, found in record["published"].items():
        add(table, name, found)
    for name, split in record["splits"].items():
        add(splits, name, split["figures"])
    for k, found in record["figures"].get("at", {}).items():
        add(candidates, f"pred@{k}", found)
    return [table, *(other for other in (splits, candidates) if other.row_count > 1)]


def _caption(record: dict[str, Any], *more: str) -> Text:
    """The notes of a record, the grave ones first and in red, then what else there is to say."""
    grave = [note for note in record["notes"] if note.split(":")[0].isupper()]
    rest = [note for note in record["notes"] if note not in grave]
    grave_ones = ((printable(f"{note}; "), "bold red") for note in grave)
    return Text.assemble(*grave_ones, printable("; ".join([*rest, *more])))


def say(text: str | Path, to_stderr: bool = False) -> None:
    """Print a line."""
    print(printable(str(text)), file=sys.stderr if to_stderr else sys.stdout)


def show(*tables: Table) -> None:
    """Print tables as wide as they need to be where there is no terminal to fit."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for table in tables:
        console.print(table)


def _interval(figures: dict[str, float], key: str) -> str:
    low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
    return "" if low is None else f" [{low:.3f}, {high:.3f}]"


class _OneLine(logging.Formatter):
    """Each message on a line; a traceback, which --debug shows, on as many as it has."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class _Messages(logging.StreamHandler):
    """Messages that end the command, as print does, when nobody reads them any more, or there is no room for them."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            raise
        super().handleError(record)


def _rank() -> int:
    """This process's place among those that torchrun, Lightning or SLURM has started."""
    found = (os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(rank) for rank in found if rank.isdecimal()), 0)


def set_up_messages(arguments: list[str]) -> None:
    """Our own messages on standard output, those of libraries only where they warn of something new.

    A library that is imported afterwards may set up its own.
    """
    debug, quiet, rank = "--debug" in arguments, "--quiet" in arguments, _rank()
    ours = logging.getLogger("proactive")
    ours.handlers = [_Messages(sys.stderr if quiet else sys.stdout)]
    ours.handlers[0].setFormatter(_OneLine())
    ours.setLevel(logging.WARNING if quiet or rank else logging.INFO)
    ours.propagate = False
    if quiet or rank or not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # those of tokenizing and downloading
    if debug:
        return
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Kernels of other machines that torchao and bitsandbytes did not load, what torchao registers twice, and each try
    # to reach a hub, the last of which is shown as an error.
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",  # small batches are made faster than a process starts
        ".*logging interval.*",  # short runs are short on purpose
        ".*was configured so validation will run.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*LightningCLI's args parameter.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # so it is in a resumed run
        ".*could not find the monitored key.*",  # at the end of an epoch whose validation was before a resume
        ".*Experiment logs directory.*",  # what a resumed run logged before is kept beside it
        ".*No device id is provided.*",
        ".*gradient_checkpointing_enable.*",  # its new name is not in all versions of transformers that serve
        ".*_stable_hash_for_caching.*",  # compiled steps of torchao's optimizer are compiled anew in each process
        ".*sync_dist=True.*",  # figures are those of all ranks' rows already
    ):
        warnings.filterwarnings("ignore", message)
