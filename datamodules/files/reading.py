"""Reading foreign files: regular files of limited size, UTF-8 text, JSON of limited depth."""

import hashlib
import re
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO

from datamodules.errors import UserError

MAX_TEXT_BYTES = 16 * 2**20  # a text that is parsed at once: a record, a JSON or YAML file, a server's response
MAX_RECORDS_BYTES = 4 * 2**30  # a file of records, which is kept in memory
MAX_DEPTH = 100  # nested JSON lists and objects
PATH_HINT = "Check the path and its permissions."
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Text up to the next bracket outside of strings, and the bracket as a group; the group is empty at the end.
_BRACKETS = re.compile(r'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z))*+([\[\]{}]|\Z)', re.DOTALL)


def require_regular(path: Path, option: str = "", hint: str = PATH_HINT) -> int:
    """Check that a file is regular, and return its size in bytes.

    Opening a named pipe can block forever, and a device may have no end.

    Args:
        path: The file.
        option: Option that gave the file, for messages.
        hint: What the user should do if it cannot be read.

    Raises:
        UserError: There is no such file, or it is not regular.
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
    """Check that a file is regular, or that all files directly in a folder are.

    Raises:
        UserError: A file is not regular, or the folder cannot be read.
    """
    if not target.is_dir():
        require_regular(target, option)
        return
    try:
        paths = [path for path in target.iterdir() if not path.is_dir() and path.exists()]
    except OSError as error:
        raise UserError(f"{option}: {target}: {error.strerror}", PATH_HINT) from error
    for path in paths:
        require_regular(path, option, "Remove it from the folder.")


def open_file(
    path: Path, limit: int | None = MAX_TEXT_BYTES, option: str = "", hint: str = PATH_HINT
) -> BufferedReader:
    """Open a regular file to read its bytes; see `require_regular` for the other arguments and errors.

    Args:
        limit: Maximum number of bytes; None for no limit.

    Raises:
        UserError: The file has more bytes.
    """
    size = require_regular(path, option, hint)
    where = f"{option}: {path}" if option else str(path)
    if limit is not None and size > limit:
        raise _too_long(where, f"{size:,} bytes", limit)
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}", hint) from error


def file_digest(path: Path, option: str = "", hint: str = PATH_HINT) -> str:
    """Return the SHA-256 of a regular file of any size, in hexadecimal; see `open_file` for arguments and errors."""
    with open_file(path, None, option, hint) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path, limit: int = MAX_TEXT_BYTES, option: str = "", hint: str = PATH_HINT) -> str:
    """Read a file as text, without a byte order mark.

    Raises:
        UserError: See `open_file`, or the file is not UTF-8.
    """
    where = f"{option}: {path}" if option else str(path)
    with open_file(path, limit, option, hint) as file:
        content = file.read(limit + 1)  # files of the system, such as those in /proc, report size 0
    if len(content) > limit:
        raise _too_long(where, "more", limit)
    try:
        return content.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise not_utf8(f"{where}, line {line}") from error


def text_lines(file: IO[bytes], path: Path, *, keep_ends: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the path and number of each line, for messages, and its text. Only line feeds end lines.

    Args:
        file: The file.
        path: Its path.
        keep_ends: Whether the text includes the end of its line.

    Raises:
        UserError: A line is too long, or not UTF-8.
    """
    number = 0
    while line := file.readline(MAX_TEXT_BYTES + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > MAX_TEXT_BYTES:
            raise _too_long(where, "more", MAX_TEXT_BYTES)
        try:
            text = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode()
            yield where, text if keep_ends else text.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise not_utf8(where) from error


def is_deep(text: str) -> bool:
    """Check, without parsing and in linear time, whether JSON has more than `MAX_DEPTH` nested lists and objects."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for found in _BRACKETS.finditer(text):
        if found[1] in ("[", "{"):
            depth += 1
        elif found[1] in ("]", "}"):
            depth -= 1
        if depth > MAX_DEPTH:
            return True
    return False


def refuse_long(where: str, length: int) -> None:
    """Refuse a text that is too long to be parsed at once.

    Raises:
        UserError: It has more than `MAX_TEXT_BYTES` bytes; the message names `where` and the limit.
    """
    if length > MAX_TEXT_BYTES:
        raise _too_long(where, f"{length:,} bytes", MAX_TEXT_BYTES)


def not_utf8(where: str) -> UserError:
    """Return the error for text in another encoding."""
    return UserError(f"{where}: is not UTF-8", "Save the file as UTF-8 text.")


def _too_long(where: str, size: str, limit: int) -> UserError:
    return UserError(
        f"{where}: holds {size}, and the limit is {limit:,} bytes", "Split it, or remove what does not belong there."
    )
