"""One bad input: how it is made, how a command is given it, and what came of that."""

import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tests.patience import HANG
from tests.proactive.conftest import Ended

MISTAKE = 2
TWO_LINES = re.compile(r"error: [^\n]*\S[^\n]*\n  help: [^\n]*\S[^\n]*\n")
PAYLOAD = "PAYLOAD_RAN"  # a file that the harmless payloads of some cases would leave in the working directory


@dataclass(frozen=True)
class Place:
    """Where a case happens: an empty working directory, and what it may use but must not change."""

    folder: Path  # the working directory
    root: Path  # a small data root
    run: Path  # a finished run of the reward classifier on that root
    small_run: Sequence[str]  # options that make a run of fit small


@dataclass(frozen=True)
class Case:
    """A bad input that a command has to refuse in two lines, with exit code 2, leaving nothing behind.

    Args:
        name: What is wrong with it.
        command: The module below `proactive`, such as fit.
        arguments: What the command is given; {root} and {run} stand for the place's.
        named: What the first line of the message has to name.
        prepare: Makes the files that the arguments name, in the place's folder.
        accepted: The exit code where the input is fine after all; the neighbour of a bad one.
    """

    name: str
    command: str
    arguments: Sequence[str]
    named: str
    prepare: Callable[[Place], None] | None = None
    accepted: bool = False


class Outcome(StrEnum):
    """What came of a bad input."""

    RIGHT = "refused in two lines"
    TRACEBACK = "traceback"
    HANG = "hang"
    ACCEPTED = "accepted"
    REFUSED = "refused, though it is fine"
    EXIT_CODE = "wrong exit code"
    UNCLEAR = "not in two lines that name it"
    LEFTOVER = "files left behind or changed"
    PAYLOAD = "payload ran"


class _Hung(BaseException):
    pass


def files(folder: Path) -> dict[str, int]:
    """All that lies in a folder, with each file's size."""
    paths = list(folder.rglob("*"))
    found = {str(path.relative_to(folder)): path.lstat().st_size for path in paths if not path.is_dir()}
    kept = {str(path.relative_to(folder)): 0 for path in paths if path.is_dir()}
    return found | kept


def outcome(case: Case, ended: Ended, before: dict[str, int], after: dict[str, int]) -> Outcome:
    """Judge how a command ended, given the working directory's files before and after."""
    if PAYLOAD in after:
        return Outcome.PAYLOAD
    if "Traceback (most recent call last)" in ended.err:
        return Outcome.TRACEBACK
    if case.accepted:
        return Outcome.RIGHT if ended.code == 0 else Outcome.REFUSED
    if ended.code == 0:
        return Outcome.ACCEPTED
    if ended.code != MISTAKE:
        return Outcome.EXIT_CODE
    if not TWO_LINES.fullmatch(ended.err) or case.named not in ended.err.splitlines()[0]:
        return Outcome.UNCLEAR
    return Outcome.RIGHT if before == after else Outcome.LEFTOVER


def carried_out(case: Case, place: Place, call: Callable[..., Ended], main: Any) -> tuple[Outcome, str]:
    """Give a command a bad input in this process; what came of it, and what it said."""
    if case.prepare:
        case.prepare(place)
    before = files(place.folder)

    def hung(*args: Any) -> None:
        raise _Hung

    handler = signal.signal(signal.SIGALRM, hung)
    signal.alarm(int(HANG))
    try:
        ended = call(main, *arguments_of(case, place))
    except _Hung:
        return Outcome.HANG, ""
    except Exception as error:
        return Outcome.TRACEBACK, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    return outcome(case, ended, before, files(place.folder)), ended.err + ended.out


def arguments_of(case: Case, place: Place) -> list[str]:
    """The arguments as they are given: those of fit after the options of a small run."""
    filled = [text.replace("{root}", str(place.root)).replace("{run}", str(place.run)) for text in case.arguments]
    small = [*place.small_run, f"--data.root={place.root}"] if case.command == "fit" else []
    return [*small, *filled]


def write(name: str, content: str | bytes) -> Callable[[Place], None]:
    """Prepares a file of some content in the working directory."""

    def prepare(place: Place) -> None:
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def fifo(name: str) -> Callable[[Place], None]:
    """Prepares a named pipe that nobody writes to."""
    return lambda place: os.mkfifo(place.folder / name)
