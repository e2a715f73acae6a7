"""A file of JSON lines that only grows: a kill loses no line, and it continues with equal settings only."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from datamodules.errors import UserError
from datamodules.escaping import shortened
from datamodules.files.reading import MAX_RECORDS_BYTES, is_deep, require_regular
from datamodules.files.writing import naming_write_errors

OTHER_OUTPUT = "Give another --output."
LONGEST_VALUE = 200  # characters of a setting in a message


class OtherSettingsError(UserError):
    """A log was started with other settings."""


class AppendLog:
    """Entries in a file between `opened` and its end.

    The first line of the file holds the settings. An incomplete last line is dropped.
    """

    of: ClassVar[str] = "an evaluation"  # what it is the log of, for messages
    mode: ClassVar[int] = 0o666  # of the file, before the umask

    def __init__(self) -> None:
        self._file: io.FileIO | None = None
        self._path = Path()

    @contextlib.contextmanager
    def opened(self, path: Path, settings: dict[str, Any]) -> Iterator[Self]:
        """Read the entries of a file, and append new ones to it until the block ends.

        Raises:
            UserError: The file has other settings, is not a log, or another process writes it; or it cannot be written
                to, for example because the disk is full.
        """
        if path.exists() and require_regular(path, hint=OTHER_OUTPUT) > MAX_RECORDS_BYTES:
            raise UserError(f"{path}: larger than the limit of {MAX_RECORDS_BYTES:,} bytes", OTHER_OUTPUT)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, self.mode)
        # Without a buffer, because closing a file whose buffer cannot be written raises an error without its name.
        with io.FileIO(descriptor, "ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"{path} is being written by another process", "Wait for it, or give another --output."
                ) from error
            self._file, self._path = file, path
            try:
                self._read(path, file, json.loads(json.dumps(settings)))
                yield self
            finally:
                self._file = None

    def take(self, entry: dict[str, Any]) -> None:
        """Use an entry of the file, in its order.

        Raises:
            ValueError, KeyError, TypeError: It is not an entry of this kind of log.
        """
        raise NotImplementedError

    def _read(self, path: Path, file: io.FileIO, settings: dict[str, Any]) -> None:
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            file.truncate(0)
            fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            self._append({"fingerprint": fingerprint, "settings": settings})
            return
        try:
            # First the settings, because entries may be impossible under other ones.
            _refuse_differences(path, _parsed(lines[0])["settings"], settings)
            for line in lines[1:]:
                self.take(_parsed(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not the log of {self.of}, or an older version wrote it", OTHER_OUTPUT
            ) from error
        file.truncate(len(whole))

    def _append(self, entry: dict[str, Any]) -> None:
        """Write an entry, and sync it to the disk, if a file is open."""
        self._write(entry)
        self._sync_file()

    def _write(self, entry: dict[str, Any]) -> None:
        """Write an entry, if a file is open. It survives a kill of this process, but not a stop of the machine."""
        if self._file is None:
            return
        line = json.dumps(entry).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        with naming_write_errors(self._path):
            try:
                while line:  # a full disk may take a part
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(size)  # a later entry must not continue the line
                raise

    def _sync_file(self) -> None:
        """Sync the file to the disk, if one is open."""
        if self._file is None:
            return
        with naming_write_errors(self._path):
            os.fsync(self._file.fileno())


def _parsed(line: bytes) -> Any:
    text = line.decode()
    if is_deep(text):
        raise ValueError("nested too deeply")
    return json.loads(text)


def _refuse_differences(path: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, then, now in _differences(before, settings):
        raise OtherSettingsError(
            f"{path} was started with {name} {_value(then)}, and now it is {_value(now)}",
            "Continue with the same options, or give another --output.",
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The settings that differ: their names, with dots in names of nested settings, and both values."""
    for name in {**now, **then}:
        one, other = then.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{parent}{name}.")
        elif one != other:
            yield f"{parent}{name}", one, other


def _value(value: Any) -> str:
    return shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), LONGEST_VALUE)
