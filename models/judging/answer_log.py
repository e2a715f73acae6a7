"""Keeps answers as soon as they arrive, so that no question is asked twice."""

from collections.abc import Mapping
from typing import Any

from datamodules.files.append_log import AppendLog
from models.judging.budget import Usage

# Finish reasons of complete replies on several servers; others are length, content_filter, tool_calls.
FINAL = ("stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete", "completed")


def is_final(finish_reason: str | None) -> bool:
    """Whether a reply is complete, as far as its finish reason says."""
    return not finish_reason or finish_reason.lower() in FINAL


class AnswerLog(AppendLog):
    """Texts by key, in memory, and in a file between `opened` and its end. A kill loses no line of the file.

    `unfinished` maps the key of an incomplete reply to its finish reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: dict[str, Usage] = {}  # by role, of the requests whose replies it contains
        self.texts: dict[str, str] = {}
        self.unfinished: dict[str, str] = {}

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
        if finish_reason and not is_final(finish_reason):
            self.unfinished[key] = finish_reason

    def take(self, entry: dict[str, Any]) -> None:
        self._note(entry["key"], entry["text"], entry["finish_reason"])
        if "usage" in entry:
            self._count(entry, Usage.of(entry["usage"]))
