"""Folders of sessions: they are private, and old ones can be removed."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from datamodules.files.writing import remove
from proactive.assistant.session_log import SESSION_FILE

DAY = 86_400.0


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Within this context, only their owner can read the files and folders that this process creates."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_private(folder: Path) -> None:
    """Create a folder that only its owner can open; restrict it if it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def remove_older(parent: Path, days: int, but: Path | None = None) -> Iterator[Path]:
    """Remove sessions that were last written more than some days ago, and yield their folders.

    Args:
        parent: The folder of the sessions' folders.
        days: The number of days.
        but: A session that is not removed.
    """
    kept = but.resolve() if but else None
    for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
        log = folder / SESSION_FILE
        if folder.resolve() == kept or folder.is_symlink() or not log.is_file():
            continue
        if time.time() - log.stat().st_mtime > days * DAY and not _is_running(log):
            remove(folder)
            yield folder


def _is_running(log: Path) -> bool:
    """Whether another process writes the log."""
    with log.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
