"""Finds the folders of the runs and evaluations to compare."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.errors import UserError
from datamodules.files.run_folders import ANSWERS_FILE, CONFIG_FILE

DEPTH = 4  # levels of folders that are searched: runs/NAME/NUMBER/fold-N/NUMBER


def find_folders(paths: Sequence[Path]) -> list[Path]:
    """The folders of runs and evaluations among some paths and below them, those of a folder in the order of numbers.

    Raises:
        UserError: A path is no folder, or there is nothing to compare.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: {'is not a folder' if path.exists() else 'no such folder'}", "Give run folders.")
        for folder in _below(path, DEPTH):
            found.setdefault(folder.resolve(), folder)
    if not found:
        raise UserError(f"no run and no evaluation in {', '.join(map(str, paths))}", "Give run folders.")
    return list(found.values())


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / CONFIG_FILE).is_file() or (folder / ANSWERS_FILE).is_file():
        yield folder
    elif depth:
        try:
            inner = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}", "Check its permissions.") from error
        for path in sorted(inner, key=lambda path: [int(p) if p.isdecimal() else p for p in _parts(path.name)]):
            yield from _below(path, depth - 1)


def _parts(name: str) -> list[str]:
    """A name in texts and numbers, alternating, so that 10 comes after 9."""
    return re.split(r"(\d+)", name)
