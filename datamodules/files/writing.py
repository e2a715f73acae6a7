"""Writing files and folders so that they are there whole or not at all, and so that no link leads elsewhere."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from datamodules.errors import UserError

UNFINISHED = ".unfinished"  # ends the name of what is being written
CHUNK = 2**24
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Unfinished:
    """A new file or folder beside its place, for as long as it is written.

    It has a name that nothing had, so that no link can lead the writing elsewhere; and this process holds a lock on
    it, so that what a killed one left behind is told apart and removed by the next that writes there. What is still
    there at the end, for it was not put in its place, is removed.

    Args:
        target: Its place.
        folder: Whether it is a folder.

    Raises:
        UserError: It cannot be made, or, at the end, the disk was full while it was written.
    """

    def __init__(self, target: Path, *, folder: bool = False) -> None:
        self.target = target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, target.name)
            name = f".{target.name}."
            if folder:
                self.path = Path(tempfile.mkdtemp(UNFINISHED, name, target.parent))
                self._held = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
            else:
                self._held, name = tempfile.mkstemp(UNFINISHED, name, target.parent)
                self.path = Path(name)
        except OSError as error:
            raise cannot_write(target, error) from error
        with contextlib.suppress(OSError):  # not every network's disk can lock
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path.chmod((0o777 if folder else 0o666) & ~_umask())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if error is not None and not isinstance(error, UserError) and (reason := no_room(error)):
            raise cannot_write(self.target, reason) from error

    def end(self) -> None:
        """Remove what was not put in its place."""
        remove(self.path)
        os.close(self._held)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes were writing in a folder, of one name or of any."""
    for found in folder.glob(f".{glob.escape(name) if name else '*'}.*{UNFINISHED}"):
        with contextlib.suppress(OSError):  # somebody writes it, it is a link, or it is gone
            held = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(found)
            finally:
                os.close(held)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that it holds, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(file: IO[str] | IO[bytes]) -> None:
    """See to it that a file's content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def no_room(error: BaseException) -> str | None:
    """Why the disk took no more, if that is behind an error; libraries hide it behind errors of their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return (cause.strerror or str(cause)) if cause.errno in NO_ROOM else None
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    for number in NO_ROOM:
        if os.strerror(number) in text:
            return os.strerror(number)
    return "the disk took only a part of it" if "inline_container" in text else None  # PyTorch's writer


def cannot_write(target: Path, reason: OSError | str) -> UserError:
    """The error that says so."""
    why = (reason.strerror or str(reason)) if isinstance(reason, OSError) else reason
    return UserError(f"cannot write {target}: {why}", "Make room there, or choose another place; nothing was replaced.")


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file under another name in the same folder, then rename it into place.

    Raises:
        UserError: The disk is full, or the file cannot be made.
    """
    with Unfinished(path) as unfinished:
        with unfinished.path.open("w", encoding="utf-8") as file:
            file.write(text)
            sync(file)
        unfinished.path.replace(path)
