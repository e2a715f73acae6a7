"""The answer log: each text is stored as soon as it arrives, so that no request is sent twice."""

from collections.abc import Mapping
from typing import Any

from datamodules.files.append_log import AppendLog
from models.judging.budget import Usage

# Finish reasons of complete replies, on several servers. Incomplete ones have length, content_filter or tool_calls.
COMPLETE = ("stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete", "completed")


def is_final(finish_reason: str | None) -> bool:
    """Whether a reply is complete, as far as its finish reason says."""
    return not finish_reason or finish_reason.lower() in COMPLETE


class AnswerLog(AppendLog):
    """Texts by key. They are kept in memory and, within `with log.opened(...)`, in a file. A kill loses no line of it.

    Attributes:
        texts: The text of each key.
        unfinished: The finish reason of each incomplete reply, by key.
        used: By role, the tokens of the requests whose replies the log contains.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: dict[str, Usage] = {}
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
            notes: Further fields of the line in the file.
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
        """The tokens of all requests whose replies the log contains."""
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
