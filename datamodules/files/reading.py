"""Reading what somebody else wrote: regular files of a bounded size, UTF-8 text, JSON of a bounded depth."""

import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO

from datamodules.errors import UserError

MOST_AT_ONCE = 16 * 2**20  # bytes of what is parsed as a whole: a record, a JSON or YAML file, a server's response
MOST_ROWS = 4 * 2**30  # bytes of a file of records, all of which are kept in memory
MOST_DEPTH = 100  # JSON lists and objects within one another
PATH_HINT = "Check the path and its permissions."
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# What stands up to the next bracket that is not in a string, and that bracket; nothing at the text's end.
_BRACKETS = re.compile(r'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z))*+([\[\]{}]|\Z)', re.DOTALL)


def require_regular(path: Path, option: str = "", hint: str = PATH_HINT) -> int:
    """The size of a regular file in bytes.

    To open a named pipe waits for ever, and a device may never end.

    Args:
        path: The file.
        option: What the user gave it as, for messages.
        hint: What to do if it cannot be read.

    Raises:
        UserError: There is no such file, or it is something else.
    """
    where = f"{option}: {path}" if option else str(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}", hint) from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise UserError(f"{where}: is {kind}, not a regular file", hint)
    return found.st_size


def require_regular_files(target: Path, option: str = "") -> None:
    """Refuse what is neither a file nor a folder, and a folder that holds such a thing; not what lies deeper.

    Raises:
        UserError: There is such a thing, or the folder cannot be read.
    """
    if not target.is_dir():
        require_regular(target, option)
        return
    try:
        paths = [path for path in target.iterdir() if not path.is_dir() and path.exists()]
    except OSError as error:
        raise UserError(f"{option}: {target}: {error.strerror}", PATH_HINT) from error
    for path in paths:
        require_regular(path, option, "Take it out of the folder.")


def open_file(path: Path, most: int | None = MOST_AT_ONCE, option: str = "", hint: str = PATH_HINT) -> BufferedReader:
    """Open a regular file to read its bytes; arguments and errors as of `require_regular`.

    Args:
        most: How many bytes it may hold; any number if None.

    Raises:
        UserError: It also holds too many bytes.
    """
    size = require_regular(path, option, hint)
    where = f"{option}: {path}" if option else str(path)
    if most is not None and size > most:
        raise _too_long(where, f"{size:,} bytes", most)
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}", hint) from error


def read_text(path: Path, most: int = MOST_AT_ONCE, option: str = "", hint: str = PATH_HINT) -> str:
    """A whole file as text, without a byte order mark.

    Raises:
        UserError: As `open_file`, or it is not UTF-8.
    """
    where = f"{option}: {path}" if option else str(path)
    with open_file(path, most, option, hint) as file:
        content = file.read(most + 1)  # what the system shows as a file, as in /proc, may have no size
    if len(content) > most:
        raise _too_long(where, "more", most)
    try:
        return content.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{where}, line {line}") from error


def text_lines(file: IO[bytes], path: Path) -> Iterator[tuple[str, str]]:
    """Each line of a file, without its end, behind where it stands; only line feeds end a line.

    Raises:
        UserError: A line is too long, or not UTF-8.
    """
    number = 0
    while line := file.readline(MOST_AT_ONCE + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > MOST_AT_ONCE:
            raise _too_long(where, "more", MOST_AT_ONCE)
        try:
            yield where, (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise not_utf8(where) from error


def is_deep(text: str) -> bool:
    """Whether JSON has more than `MOST_DEPTH` lists and objects within one another; in linear time, unparsed."""
    if text.count("[") + text.count("{") <= MOST_DEPTH:
        return False
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += (found[1] in ("[", "{")) - (found[1] in ("]", "}"))
        if depth > MOST_DEPTH:
            return True
    return False


def refuse_long(where: str, length: int) -> None:
    """Refuse what is parsed at once, if it has too many bytes.

    Raises:
        UserError: It has; the message names `where` and the limit.
    """
    if length > MOST_AT_ONCE:
        raise _too_long(where, f"{length:,} bytes", MOST_AT_ONCE)


def not_utf8(where: str) -> UserError:
    """The error of text in another encoding."""
    return UserError(f"{where}: is not UTF-8", "Save the file as UTF-8 text.")


def _too_long(where: str, size: str, most: int) -> UserError:
    return UserError(
        f"{where}: holds {size}, and the limit is {most:,} bytes", "Divide it, or take out what does not belong there."
    )
