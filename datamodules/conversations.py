"""Conversation files in the published format: read one at a time, tokenized turn by turn, kept on disk.

A file is a JSON list, or JSON lines, of {"conversations": [{"role": ..., "content": ...}, ...]}. What an assistant says
is learned. Conversations that begin alike share what they share, as all rows do.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from datamodules.errors import UserError
from datamodules.prompts import Data, SegmentTokenizer, on_one_line, truncate
from datamodules.records import parse_json, validate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SHORTEST_TELLTALE = 20  # characters: what is shorter may stand in any conversation by chance


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Conversation(BaseModel):
    """Turns, one of them an assistant's after another one."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    conversations: Annotated[
        tuple[Message, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
    ]

    @model_validator(mode="after")
    def _has_an_answer(self) -> "Conversation":
        if not any(message.role == "assistant" for message in self.conversations[1:]):
            raise ValueError("expected an assistant's turn after another one")
        return self

    @property
    def scene(self) -> str:
        """A name that conversations share whose first two turns are the same: 16 hexadecimal digits."""
        turns = [[message.role, message.content] for message in self.conversations[:2]]
        return hashlib.blake2b(json.dumps(turns).encode(), digest_size=8).hexdigest()


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The conversations of a file; one at a time is in memory.

    Raises:
        UserError: The file cannot be read, or a record does not fit.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            file.seek(len(BYTE_ORDER_MARK) if start.startswith(BYTE_ORDER_MARK) else 0)
            is_list = start.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
            for where, item in _items_of_list(path, file) if is_list else _items_of_lines(path, file):
                yield validate(item, Conversation, where)
    except OSError as error:
        raise UserError(
            f"data.conversations: {path}: {error.strerror or error}", "Check the path and its permissions."
        ) from error


def _items_of_list(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    import ijson

    index = -1
    try:
        for index, item in enumerate(ijson.items(file, "item", use_float=True)):
            yield f"{path}, index {index}", item
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: expected JSON after index {index}: {reason}", "Mend that text.") from error


def _items_of_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                yield where, parse_json(line.decode(), where)
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: is not UTF-8", "Save the file as UTF-8 text.") from error


def telltale_pattern(events: Collection[str]) -> re.Pattern[str] | None:
    """What finds the text of events in a conversation, as it is or as a JSON string; None if there is none to find."""
    texts = {text for text in events if len(text) >= SHORTEST_TELLTALE}
    quoted = {json.dumps(text, ensure_ascii=ascii_only)[1:-1] for text in texts for ascii_only in (True, False)}
    return re.compile("|".join(map(re.escape, sorted(texts | quoted)))) if texts else None


def mentions(conversation: Conversation, pattern: re.Pattern[str] | None) -> bool:
    """Whether a turn contains one of the events of `telltale_pattern`."""
    return pattern is not None and any(pattern.search(message.content) for message in conversation.conversations)


class ConversationTokenizer:
    """Token ids of conversations in a tokenizer's own chat format, or in a plain one where it has none.

    Every turn is tokenized on its own, so conversations that begin alike share their token ids, and special tokens
    come from the chat's format alone. An assistant's turn is learned with the end token that follows it.

    Args:
        tokenizer: Whose chat format.
        max_length: The greatest number of tokens of a conversation.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._segmenter = SegmentTokenizer(tokenizer)
        self._special = set(tokenizer.get_added_vocab().values())
        self._prefix = [] if tokenizer.chat_template else self._segmenter.prefix  # a chat format has its own

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]] | None:
        """Token ids, and which of them are learned, counted from 0; what follows the last answer is left out.

        Turns after the first one are left out, oldest first, until at most `max_length` tokens are left. None if the
        first and the last turn alone are more.
        """
        messages = conversation.conversations
        messages = messages[: max(place for place, turn in enumerate(messages) if turn.role == "assistant") + 1]
        *before, end = self._segmenter.encode([(piece,) for piece in self._format(messages)])
        contents = self._segmenter.encode([(self._content(message),) for message in messages])
        ids: list[list[int]] = []  # of each turn, with what the format puts before it
        marks: list[list[int]] = []  # 1 for tokens that are learned
        follows_answer = False
        for message, opening, content in zip(messages, before, contents, strict=True):
            is_answer = message.role == "assistant"
            ids.append([*opening, *content])
            marks.append([0] * len(opening) + [int(is_answer)] * len(content))
            if follows_answer and opening and opening[0] in self._special:
                marks[-1][0] = 1
            follows_answer = is_answer
        ids[-1].append(end[0] if end and end[0] in self._special else self.tokenizer.eos_token_id)
        marks[-1].append(1)
        room = self.max_length - len(self._prefix)
        (kept, _), (learned, _) = truncate(ids, room), truncate(marks, room)
        if len(kept) > room:
            return None
        return [*self._prefix, *kept], [len(self._prefix) + place for place, mark in enumerate(learned) if mark]

    def _content(self, message: Message) -> Data:
        return Data(message.content if self.tokenizer.chat_template else on_one_line(message.content))

    def _format(self, messages: Sequence[Message]) -> list[str]:
        """What the format puts before each turn's content, and after the last one.

        Raises:
            UserError: The tokenizer's chat format does not take such turns, or changes them.
        """
        if not self.tokenizer.chat_template:
            end = {"assistant": f"{self.tokenizer.eos_token}\n"}
            closings = ["", *(end.get(message.role, "\n") for message in messages)]
            openings = [*(f"{message.role}: " for message in messages), ""]
            return [closing + opening for closing, opening in zip(closings, openings, strict=True)]
        stand_ins = [f"CONTENT-{number}-OF-TURN" for number in range(len(messages))]
        turns = [{"role": m.role, "content": stand_in} for m, stand_in in zip(messages, stand_ins, strict=True)]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template raises what it likes
            raise UserError(
                f"data.conversations: the tokenizer's chat format refuses turns of {[m.role for m in messages]}: "
                f"{' '.join(str(error).split())[:200]}",
                "Bring the conversations into an order that the backbone knows.",
            ) from error
        pieces = re.split("|".join(stand_ins), str(text))
        if len(pieces) != len(messages) + 1 or re.findall("|".join(stand_ins), str(text)) != stand_ins:
            raise UserError(
                "data.conversations: the tokenizer's chat format leaves turns out or repeats them",
                "Use another backbone, or one whose tokenizer has no chat format.",
            )
        return pieces
