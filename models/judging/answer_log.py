"""Keeps answers as soon as they arrive, so that no question is asked twice."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from datamodules.errors import UserError
from datamodules.escaping import shortened
from datamodules.files.reading import MOST_ROWS, is_deep, require_regular
from models.judging.budget import Usage

OTHER_OUTPUT = "Give another --output."
# Finish reasons of complete replies on several servers; others are length, content_filter, tool_calls.
FINAL = ("stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete", "completed")
LONGEST_VALUE = 200  # characters of a setting in a message


class AnswerLog:
    """Texts by key, in memory, and in a file between `opened` and its end. A kill loses no line of the file.

    The first line of the file holds the settings. An incomplete last line is dropped. `unfinished` maps the key of an
    incomplete reply to its finish reason.
    """

    def __init__(self) -> None:
        self.used: dict[str, Usage] = {}  # by role, of the requests whose replies it contains
        self.texts: dict[str, str] = {}
        self.unfinished: dict[str, str] = {}
        self._file: BinaryIO | None = None

    @contextlib.contextmanager
    def opened(self, path: Path, settings: dict[str, Any]) -> Iterator[Self]:
        """Read the texts of a file, and append new texts to it until the block ends.

        Raises:
            UserError: The file has other settings, is not a log, or another process writes it.
        """
        if path.exists() and require_regular(path, hint=OTHER_OUTPUT) > MOST_ROWS:
            raise UserError(f"{path}: larger than the limit of {MOST_ROWS:,} bytes", OTHER_OUTPUT)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"{path} is being written by another evaluation", "Wait for it, or give another --output."
                ) from error
            self._file = file
            try:
                self._read(path, file, json.loads(json.dumps(settings)))
                yield self
            finally:
                self._file = None

    def add(
        self,
        key: str,
        text: str,
        where: str,
        finish_reason: str | None = None,
        usage: Usage | None = None,
        seconds: float | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep a text; it is synced to the file, if one is open, before this returns.

        Args:
            key: Identifies the request.
            text: The text.
            where: A description of the request.
            finish_reason: Why the text ended, if known.
            usage: The tokens of a request to an endpoint.
            seconds: How long that request took, with its retries.
            notes: More entries for the file.
        """
        self._note(key, text, finish_reason)
        entry: dict[str, Any] = {"key": key, "where": where, "text": text, "finish_reason": finish_reason}
        entry |= notes or {}
        if usage is not None:
            self._count(entry, usage)
            reported = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
            entry |= {"usage": None if usage.unreported else reported, "seconds": seconds}
        self._append(entry)

    def final(self, key: str) -> str | None:
        """The text of a key; None if the reply is incomplete, because nothing may be parsed from it."""
        return None if key in self.unfinished else self.texts[key]

    @property
    def usage(self) -> Usage:
        """The usage of all requests whose replies it contains."""
        return sum(self.used.values(), Usage())

    def _count(self, entry: Mapping[str, Any], usage: Usage) -> None:
        role = entry.get("role", "")
        self.used[role] = self.used.get(role, Usage()) + usage

    def _note(self, key: str, text: str, finish_reason: str | None) -> None:
        self.texts[key] = text
        if finish_reason and finish_reason.lower() not in FINAL:
            self.unfinished[key] = finish_reason

    def _read(self, path: Path, file: BinaryIO, settings: dict[str, Any]) -> None:
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
            before = _parsed(lines[0])["settings"]
            for line in lines[1:]:
                entry = _parsed(line)
                self._note(entry["key"], entry["text"], entry["finish_reason"])
                if "usage" in entry:
                    self._count(entry, Usage.of(entry["usage"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not the log of an evaluation, or an older version wrote it", OTHER_OUTPUT
            ) from error
        for name in sorted(set(before) | set(settings)):
            if (then := before.get(name)) != (now := settings.get(name)):
                raise UserError(
                    f"{path} was started with {name} {_value(then)}, and now it is {_value(now)}",
                    "Continue with the same options, or give another --output.",
                )
        file.truncate(len(whole))

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _parsed(line: bytes) -> Any:
    text = line.decode()
    if is_deep(text):
        raise ValueError("nested too deeply")
    return json.loads(text)


def _value(value: Any) -> str:
    return shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), LONGEST_VALUE)
