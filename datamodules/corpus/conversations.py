"""Conversations of tables, read one at a time.

A record is {"conversations": [{"role": ..., "content": ...}, ...]}, or a conversation in the format of ShareGPT or
OpenAI. The turns of the assistant are learned.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, model_validator
from pydantic_core import PydanticCustomError

from datamodules.corpus.conversation_formats import converted
from datamodules.corpus.json_records import shown, validate
from datamodules.corpus.records import Text
from datamodules.corpus.tables import Tables, open_training_tables

MIN_EVENT_LENGTH = 20  # characters; a shorter event may occur in a conversation by chance
PAGE = "docs/how-to/conversations.md"
COLUMNS = ("conversations", "messages", "system")

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
    ({"history", "proposal"}, "an annotated row", "Give the table of such rows with --data.root"),
    ({"observation", "agent_response"}, "a step of a trace", "Give the folder of such traces with --data.root"),
    ({"text"}, '"text"', "Divide the text into turns of role and content"),
)


def _list_of_turns(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError("expected a list of turns")
    return tuple(value)


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
        BeforeValidator(_list_of_turns),
    ]

    @model_validator(mode="before")
    @classmethod
    def _is_of_no_other_format(cls, data: Any) -> Any:
        if isinstance(data, dict) and "conversations" not in data:
            for fields, what, hint in OTHER_FORMATS:
                if fields <= data.keys():
                    raise _other_format(f'expected the field "conversations", got {what}', hint)
            raise ValueError(f'expected the field "conversations" or "messages", got {shown([*data])}')
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


def open_conversations(source: str) -> Tables:
    """Open a source of conversations; see `open_training_tables`.

    Raises:
        UserError: It is no such source, or none of its tables trains.
    """
    return open_training_tables(source, "data.conversations", limit=None)


def read_conversations(tables: Tables, counts: Counter[str] | None = None) -> Iterator[Conversation]:
    """Yield the conversations that train, one at a time.

    Args:
        tables: The tables of a source.
        counts: Counts what was converted; see `datamodules.corpus.conversation_formats`.

    Raises:
        UserError: A table cannot be read, or a record does not fit.
    """
    for table in tables.of("train"):
        columns = COLUMNS if set(COLUMNS) & set(table.names) else table.names  # those of other formats are refused
        for where, record in table.records(columns):
            item = converted(record, Counter() if counts is None else counts)
            if item is not None:
                yield validate(item, Conversation, where)


def reading_notes(tables: Tables) -> list[str]:
    """Return what of a source is read and what is not, in sentences."""
    return tables.reading_notes(COLUMNS, "conversations")


def event_pattern(events: Collection[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds events in a conversation, as text or as a JSON string; None without long events."""
    texts = {text for text in events if len(text) >= MIN_EVENT_LENGTH}
    quoted = {json.dumps(text, ensure_ascii=ascii_only)[1:-1] for text in texts for ascii_only in (True, False)}
    return re.compile("|".join(map(re.escape, sorted(texts | quoted)))) if texts else None


def contains_event(conversation: Conversation, pattern: re.Pattern[str] | None) -> bool:
    """Check whether a turn contains an event of `event_pattern`."""
    return pattern is not None and any(pattern.search(message.content) for message in conversation.conversations)
