"""Conversation files, read one conversation at a time.

A file is a JSON list, or JSON lines, of {"conversations": [{"role": ..., "content": ...}, ...]}, or of conversations in
the formats of ShareGPT and OpenAI. The turns of the assistant are learned.
"""

import hashlib
import json
import mmap
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, model_validator
from pydantic_core import PydanticCustomError

from datamodules.corpus.conversation_formats import converted
from datamodules.corpus.json_records import parse_json, validate
from datamodules.corpus.records import Text
from datamodules.errors import UserError
from datamodules.files.reading import MAX_TEXT_BYTES, not_utf8, open_file, refuse_long, text_lines

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MIN_EVENT_LENGTH = 20  # characters; a shorter event may occur in a conversation by chance
PAGE = "docs/how-to/conversations.md"
# Where JSON values begin and end. A string with all its contents is one match.
_JSON_MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_NOT_BLANK = re.compile(rb"\S")

# Formats of other projects: the fields that identify each, its name, and how to convert it.
OTHER_FORMATS: tuple[tuple[set[str], str, str], ...] = (
    (
        {"instruction", "output"},
        'Alpaca\'s "instruction" and "output"',
        "Make a user turn and an assistant turn of them",
    ),
    ({"chosen", "rejected"}, 'pairs of "chosen" and "rejected"', "Make conversations of those that were chosen"),
    ({"prompt", "completion"}, '"prompt" and "completion"', "Make a user turn and an assistant turn of them"),
    ({"obs", "pred_task"}, "an annotated row", "Give the folder of such rows with --data.root"),
    ({"observation", "agent_response"}, "a step of a trace", "Give the folder of such traces with --data.root"),
    ({"text"}, '"text"', "Divide the text into turns of role and content"),
)


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: Text


class Conversation(BaseModel):
    """Turns, at least one of them an assistant's that is not the first."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    page: ClassVar[str] = PAGE

    conversations: Annotated[
        tuple[Message, ...],
        FailFast(),
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ]

    @model_validator(mode="before")
    @classmethod
    def _is_of_no_other_format(cls, data: Any) -> Any:
        if isinstance(data, dict) and "conversations" not in data:
            for fields, what, hint in OTHER_FORMATS:
                if fields <= data.keys():
                    raise _other_format(f'expected the field "conversations", got {what}', hint)
        turns = data.get("conversations") if isinstance(data, dict) else None
        for place, turn in enumerate(turns if isinstance(turns, list) else ()):
            if isinstance(turn, dict):
                _refuse_other_turns(f"conversations[{place}]", turn)
        return data

    @model_validator(mode="after")
    def _has_an_answer(self) -> "Conversation":
        if not any(message.role == "assistant" for message in self.conversations[1:]):
            raise ValueError("expected an assistant's turn after another one")
        return self

    @property
    def scene(self) -> str:
        """Digest of the first two turns, 16 hexadecimal digits. Conversations that share it are in the same split."""
        turns = [[message.role, message.content] for message in self.conversations[:2]]
        return hashlib.blake2b(json.dumps(turns).encode(), digest_size=8).hexdigest()


def _refuse_other_turns(place: str, turn: dict[str, Any]) -> None:
    calls = [name for name in ("tool_calls", "function_call", "tool_call_id") if turn.get(name)]
    if calls or turn.get("role") in ("tool", "function"):
        raise _other_format(
            f"{place}: expected a turn of text, got a call of tools ({calls[0] if calls else turn['role']})",
            "Leave turns that call tools or answer calls out, or write them as content of the assistant and the user",
        )
    if isinstance(turn.get("content"), list):
        raise _other_format(f"{place}: expected content in one text, got a list of parts", "Join the parts of text")


def _other_format(what: str, hint: str) -> PydanticCustomError:
    return PydanticCustomError("other_format", what, {"hint": f"{hint}; {PAGE} shows the format."})


def read_conversations(path: Path, counts: Counter[str] | None = None) -> Iterator[Conversation]:
    """Yield the conversations of a file. Only one is in memory at a time.

    Args:
        path: The file.
        counts: Counts what was converted; see `datamodules.corpus.conversation_formats`.

    Raises:
        UserError: The file cannot be read, or a record does not fit.
    """
    with open_file(path, None, "data.conversations") as file:
        start = file.read(4096)
        file.seek(0)
        is_list = start.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
        lines = ((where, line) for where, line in text_lines(file, path) if line.strip())
        for where, text in _items_of_list(path, file) if is_list else lines:
            item = converted(parse_json(text, where), Counter() if counts is None else counts)
            if item is not None:
                yield validate(item, Conversation, where)


def _items_of_list(path: Path, file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the location and the text of each item. The file is mapped into memory, not read."""
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    depth = index = start = place = 0
    while True:
        where, limit = f"{path}, index {index}", start + MAX_TEXT_BYTES + 1
        mark = _JSON_MARKS.search(content, place, limit)
        place = mark.end() if mark else min(limit, len(content))
        refuse_long(where, place - start)
        if mark is None:
            raise UserError(
                f"{where}: expected JSON: the file ends within the list", "Mend that text, or end the list."
            )
        sign = mark[0]
        if sign in (b"[", b"{"):
            depth += 1
        elif sign in (b"]", b"}"):
            depth -= 1
        if depth == 1 and sign == b"[" and not start:
            start = mark.end()
        elif depth == 0 or (depth == 1 and sign == b","):
            text = content[start : mark.start()]
            if depth or index or text.strip():  # the list is not empty
                yield where, _item(text, where)
            index, start = index + 1, mark.end()
        if depth == 0:
            break
    if _NOT_BLANK.search(content, start):
        raise UserError(f"{path}: expected JSON: more follows the list", "Leave one list, or one record a line.")


def _item(text: bytes, where: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(where) from error


def event_pattern(events: Collection[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds events in a conversation, as text or as a JSON string; None without long events."""
    texts = {text for text in events if len(text) >= MIN_EVENT_LENGTH}
    quoted = {json.dumps(text, ensure_ascii=ascii_only)[1:-1] for text in texts for ascii_only in (True, False)}
    return re.compile("|".join(map(re.escape, sorted(texts | quoted)))) if texts else None


def contains_event(conversation: Conversation, pattern: re.Pattern[str] | None) -> bool:
    """Check whether a turn contains an event of `event_pattern`."""
    return pattern is not None and any(pattern.search(message.content) for message in conversation.conversations)
