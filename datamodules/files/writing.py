"""Atomic writing: a file or folder is complete or absent, and no link can redirect the write."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from datamodules.errors import UserError

UNFINISHED = ".unfinished"  # suffix of files that are being written
CHUNK = 2**24
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
AT_WORKING_DIRECTORY, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2


class Unfinished:
    """A temporary file or folder next to its final path.

    Its name is new, so no link can redirect the write. This process locks it. If the process is killed, the lock is
    released, and the next writer removes the leftover. On exit it is removed, unless it was renamed to its final path.

    Args:
        target: The final path.
        folder: Whether to create a folder instead of a file.

    Raises:
        UserError: It cannot be created, or the disk was full while it was written.
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
            raise write_error(target, error) from error
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path.chmod((0o777 if folder else 0o666) & ~_umask())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        if error is not None and not isinstance(error, UserError) and (reason := disk_full(error)):
            raise write_error(self.target, reason) from error

    def end(self) -> None:
        """Remove the temporary file or folder if it was not renamed."""
        remove(self.path)
        os.close(self._held)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of killed processes from a folder: those for the final name `name`, or all."""
    for found in folder.glob(f".{glob.escape(name) if name else '*'}.*{UNFINISHED}"):
        with contextlib.suppress(OSError):  # another process is writing it, it is a link, or it is gone
            held = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(found)
            finally:
                os.close(held)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(file: IO[str] | IO[bytes]) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def disk_full(error: BaseException) -> str | None:
    """Return the reason if a full disk caused an error, even if a library raised another error from it; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return (cause.strerror or str(cause)) if cause.errno in DISK_FULL else None
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    for number in DISK_FULL:
        if os.strerror(number) in text:
            return os.strerror(number)
    return "a part could not be written" if "inline_container" in text else None  # from PyTorch's writer


def write_error(target: Path, reason: OSError | str) -> UserError:
    """Return the error for a file that cannot be written."""
    why = (reason.strerror or str(reason)) if isinstance(reason, OSError) else reason
    return UserError(
        f"cannot write {target}: {why}",
        "Make room on the disk, or choose another path; what was written before is intact.",
    )


@contextlib.contextmanager
def naming_write_errors(target: Path) -> Iterator[None]:
    """Raise a UserError that names the file if a write fails; the errors of open files do not name them."""
    try:
        yield
    except OSError as error:
        raise write_error(target, error) from error


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
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
    """Write a UTF-8 file under a temporary name in the same folder, then rename it.

    Raises:
        UserError: The disk is full, or the file cannot be created.
    """
    with Unfinished(path) as unfinished:
        with unfinished.path.open("w", encoding="utf-8") as file:
            file.write(text)
            sync(file)
        unfinished.path.replace(path)


def put_in_place(new: Path, target: Path) -> None:
    """Replace a file or folder by a new one, and remove the old one.

    At any moment the old one or the new one exists. If the system cannot exchange two folders in one step, a kill
    between two steps can leave the old one under another name. `recover` then restores it.
    """
    replaced = _replaced(target)
    if target.exists() and (target.is_dir() or new.is_dir()):
        remove(replaced)
        if _exchange(new, target):
            remove(new)
            return
        target.rename(replaced)
    new.replace(target)
    remove(replaced)


def recover(path: Path) -> Path:
    """Restore a file or folder that an interrupted `put_in_place` moved aside; return its path."""
    if not path.exists():
        with contextlib.suppress(FileNotFoundError):  # nothing was moved, or another process has restored it
            _replaced(path).rename(path)
    return path


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step; return False if the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = (AT_WORKING_DIRECTORY, os.fsencode(one), AT_WORKING_DIRECTORY, os.fsencode(other))
    return rename is not None and rename(*paths, EXCHANGE) == 0


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")
