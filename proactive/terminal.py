"""How every command starts and ends: messages of one line, exit codes."""

import atexit
import contextlib
import errno
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from datamodules.errors import UserError
from datamodules.escaping import printable
from datamodules.files.writing import disk_full
from proactive.environment import refuse_impossible_rank
from proactive.parser import one_line

OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # of a stream, which has no file name
MISTAKE = 2  # exit code after a user's mistake
LEVELS = {  # of the messages of a library that are shown
    **dict.fromkeys(("lightning.pytorch", "lightning.fabric", "lightning"), logging.WARNING),
    # Kernels that torchao and bitsandbytes lack on this machine, types that torchao registers twice, and each retry of
    # a hub, whose last failure is shown as an error.
    **dict.fromkeys(("torchao", "bitsandbytes", "torch.utils._pytree", "huggingface_hub"), logging.ERROR),
}


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command's `main` on the process's arguments and exit: 0, or 2 after a user's mistake.

    With --debug among the arguments, exceptions show their traceback.
    """
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    _open_closed_streams()
    before = signal.signal(signal.SIGTERM, _end)
    try:
        refuse_impossible_rank()  # before a command imports Lightning, which would raise a traceback
        set_up_messages(arguments)
        _refuse_undecodable(arguments)
        main(arguments)
        sys.stdout.flush()  # raises a write error here, not while Python exits
    except SystemExit:
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output has exited
        _discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        mistake = as_user_error(error)
        if debug or mistake is None:
            raise
        rank = _rank()
        with contextlib.suppress(OSError):  # stderr is closed
            print(f"error{f' (rank {rank})' if rank else ''}: {mistake.what}", file=sys.stderr)
            print(f"  help: {mistake.hint}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        sys.exit(MISTAKE)
    finally:
        signal.signal(signal.SIGTERM, before)
        atexit.register(_end_without_traceback)
    sys.exit(0)


def _end_without_traceback() -> None:
    """While Python exits, let Ctrl-C end the process. Its handlers would raise exceptions that nobody catches."""
    if callable(signal.getsignal(signal.SIGINT)):  # a shell starts jobs in the background with it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _open_closed_streams() -> None:
    """Open /dev/null instead of standard streams that the caller closed, so that no file gets their descriptors."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))


def _discard_output() -> None:
    """Send buffered output to /dev/null, because Python would write it again while it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_undecodable(arguments: list[str]) -> None:
    """Raise a UserError for an argument that is not UTF-8, because no file of a run could contain it."""
    for number, argument in enumerate(arguments, 1):
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise UserError(f"argument {number} is not UTF-8: {argument!a}", "Give names in UTF-8.")


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C, so that temporary files are removed."""
    sys.exit(128 + number)


def as_user_error(error: BaseException) -> UserError | None:
    """The user's mistake that caused an exception; None for an exception that is a bug."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, MemoryError):
        return UserError("out of memory while data was read or prepared", "Give less data, or use a larger machine.")
    if reason := disk_full(error):
        return UserError(f"the disk is full: {reason}", "Free space there; files written before are intact.")
    if isinstance(error, OSError) and error.filename:
        return UserError(
            f"{error.filename}: {error.strerror}", "Check the path, its permissions and the free space on the disk."
        )
    if isinstance(error, OSError) and error.errno in OUTPUT_ERRORS:
        return UserError(
            f"cannot write the output: {error.strerror}",
            "Check where standard output goes, and the free space on the disk.",
        )
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from torch import OutOfMemoryError

    text = one_line(str(error))
    if isinstance(error, OutOfMemoryError) or "can't allocate memory" in text:
        return UserError(
            f"out of memory: {text}",
            "Lower data.token_budget (layout rows: data.micro_batch_size), or set model.gradient_checkpointing.",
        )
    if isinstance(error, MisconfigurationException):
        return UserError(text, "Change the trainer's options; see --help.")
    return None


def say(text: str | Path, to_stderr: bool = False) -> None:
    """Print a line."""
    print(printable(str(text)), file=sys.stderr if to_stderr else sys.stdout)


def same_command(command: str, arguments: Sequence[str], folder: Path) -> str:
    """Return the command line that continues in an output folder.

    Args:
        command: The name of the command.
        arguments: What it was given.
        folder: Its output folder.
    """
    given = any(argument == "--output" or argument.startswith("--output=") for argument in arguments)
    output = [] if given else ["--output", str(folder)]
    return shlex.join(["python", "-m", f"proactive.{command}", *arguments, *output])


class _OneLine(logging.Formatter):
    """One line for each message. Tracebacks, which --debug shows, keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


class _Messages(logging.StreamHandler):
    """A handler that ends the command, as print does, if the stream is closed or the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            raise
        super().handleError(record)


def _rank() -> int:
    """The rank of this process, if torchrun, Lightning or SLURM started it; else 0."""
    found = (os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((int(rank) for rank in found if rank.isdecimal()), 0)


def set_up_messages(arguments: list[str]) -> None:
    """Show our messages on standard output, and hide messages of libraries that tell a user nothing new.

    Libraries set up their own when they are imported; see `quiet_imports`.
    """
    debug, quiet, rank = "--debug" in arguments, "--quiet" in arguments, _rank()
    ours = logging.getLogger("proactive")
    ours.handlers = [_Messages(sys.stderr if quiet else sys.stdout)]
    ours.handlers[0].setFormatter(_OneLine())
    ours.setLevel(logging.WARNING if quiet or rank else logging.INFO)
    ours.propagate = False
    if quiet or rank or not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # of tokenizing and downloading
    if debug:
        return
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for message in (
        ".*does not have many workers.*",  # small batches take less time than starting a process
        ".*logging interval.*",  # short runs are short on purpose
        ".*was configured so validation will run.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*LightningCLI's args parameter.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        ".*could not find the monitored key.*",  # end of an epoch whose validation was before the resume
        ".*Experiment logs directory.*",  # a resumed run; `_keep_earlier_curves` renames the earlier log
        ".*No device id is provided.*",
        ".*gradient_checkpointing_enable.*",  # not all supported versions of transformers have its new name
        ".*sync_dist=True.*",  # metrics already include the rows of all ranks
    ):
        warnings.filterwarnings("ignore", message)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Import libraries within this context, and keep what `set_up_messages` has set up.

    Commands import torch this way after they have checked their options, because the import takes seconds.
    """
    before = {name: logging.getLogger(name).level for name in LEVELS}
    yield
    for name, level in before.items():
        if level:
            logging.getLogger(name).setLevel(level)
