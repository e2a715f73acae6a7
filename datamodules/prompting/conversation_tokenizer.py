"""Token ids of conversations in a tokenizer's chat format."""

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from datamodules.corpus.conversations import Conversation, Message
from datamodules.errors import UserError
from datamodules.escaping import on_one_line
from datamodules.prompting.chat_format import ChatTemplateError, render_chat
from datamodules.prompting.segments import Data, SegmentTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ConversationTokenizer:
    """Tokenizes conversations in a tokenizer's chat format, or in a plain format if it has none.

    Every turn is tokenized on its own, so conversations with the same beginning share its token ids, and special tokens
    come from the chat format only. An assistant's turn is learned as the format writes it, with the end token after it:
    many formats trim texts, some drop a part.

    Args:
        tokenizer: The tokenizer.
        max_length: Maximum number of tokens of a conversation.

    Attributes:
        rewritten: Number of conversations with a text that the chat format changed.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.rewritten = 0
        self._segmenter = SegmentTokenizer(tokenizer, chat=bool(tokenizer.chat_template))
        self._special = set(tokenizer.get_added_vocab().values())

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]] | None:
        """Return token ids, and the positions of the learned ones. Turns after the last answer are left out.

        A conversation that is too long is shortened to its system turn and the turns from the earliest user turn that
        fits.

        Returns:
            None if no part fits. No positions if the last answer is empty in the chat format.

        Raises:
            UserError: The chat format does not accept these turns, or changes more than their texts.
        """
        messages = conversation.conversations
        messages = messages[: max(place for place, turn in enumerate(messages) if turn.role == "assistant") + 1]
        ids, learned, starts = self._encode(messages)
        if len(ids) <= self.max_length:
            return ids, learned
        system = messages[:1] if messages[0].role == "system" else ()
        for place in range(len(system) + 1, len(messages)):
            if messages[place].role == "user" and len(ids) - starts[place] <= self.max_length:
                part, learned, _ = self._encode((*system, *messages[place:]))
                if len(part) <= self.max_length:
                    return part, learned
        return None

    def _encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int], list[int]]:
        """Return token ids of turns, the positions of the learned ones, and the position of each turn's text."""
        pieces, texts = self._format(messages)
        if self.tokenizer.chat_template:  # a space belongs to the word behind it
            kept = [piece.rstrip(" ") for piece in pieces[:-1]]
            texts = [piece[len(k) :] + text for piece, k, text in zip(pieces[:-1], kept, texts, strict=True)]
            pieces = [*kept, pieces[-1]]
        alternating = [(piece, Data(text)) for piece, text in zip(pieces[:-1], texts, strict=True)]
        *parts, end = self._segmenter.encode([*((part,) for pair in alternating for part in pair), (pieces[-1],)])
        before, contents = parts[::2], parts[1::2]
        ids = list(self._segmenter.prefix)
        learned: list[int] = []
        starts: list[int] = []
        follows_answer = False
        for message, opening, content, text in zip(messages, before, contents, texts, strict=True):
            if follows_answer and opening and opening[0] in self._special:
                learned.append(len(ids))
            ids += opening
            starts.append(len(ids))
            follows_answer = message.role == "assistant" and bool(text.strip())
            learned += range(len(ids), len(ids) + len(content)) if follows_answer else ()
            ids += content
        learned.append(len(ids))
        ids.append(end[0] if end and end[0] in self._special else self.tokenizer.eos_token_id)
        return ids, learned if follows_answer else [], starts

    def _format(self, messages: Sequence[Message]) -> tuple[list[str], list[str]]:
        """Return what the format writes before each text and after the last, and each text as it writes it."""
        texts = [message.content for message in messages]
        if not self.tokenizer.chat_template:
            end = {"assistant": f"{self.tokenizer.eos_token}\n"}
            closings = ["", *(end.get(message.role, "\n") for message in messages)]
            openings = [*(f"{message.role}: " for message in messages), ""]
            pieces = [closing + opening for closing, opening in zip(closings, openings, strict=True)]
            return pieces, [on_one_line(text) for text in texts]
        placeholders = [f"CONTENT-{number}-OF-TURN" for number in range(len(messages))]
        with_placeholders = self._apply(messages, placeholders)
        pieces = re.split("|".join(placeholders), with_placeholders)
        if re.findall("|".join(placeholders), with_placeholders) != placeholders:
            raise UserError(
                "data.conversations: the tokenizer's chat format leaves turns out, repeats or rewrites them",
                "Use another backbone, or one whose tokenizer has no chat format.",
            )
        whole = self._apply(messages, texts)
        if whole != _joined(pieces, texts):
            texts = [self._as_written(messages, placeholders, pieces, place) for place in range(len(messages))]
            self.rewritten += 1
            if whole != _joined(pieces, texts):
                raise _unclear_format(messages[-1])
        return pieces, texts

    def _as_written(self, messages: Sequence[Message], placeholders: list[str], pieces: list[str], place: int) -> str:
        """Return one text as the format writes it; the other turns keep their placeholders."""
        mixed = [*placeholders[:place], messages[place].content, *placeholders[place + 1 :]]
        text = self._apply(messages, mixed)
        before = _joined(pieces[: place + 1], placeholders[:place])
        after = _joined(pieces[place + 1 :], placeholders[place + 1 :])
        if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
            raise _unclear_format(messages[place])
        return text[len(before) : len(text) - len(after)]

    def _apply(self, messages: Sequence[Message], texts: Sequence[str]) -> str:
        turns = [{"role": turn.role, "content": text} for turn, text in zip(messages, texts, strict=True)]
        try:
            return render_chat(self.tokenizer, turns)
        except ChatTemplateError as error:
            raise UserError(
                f"data.conversations: the chat template {error}",
                "Bring the conversations into an order that the backbone knows.",
            ) from error


def _joined(pieces: Sequence[str], texts: Sequence[str]) -> str:
    """Join pieces and texts alternately, beginning with a piece."""
    return "".join(part for pair in zip_longest(pieces, texts, fillvalue="") for part in pair)


def _unclear_format(message: Message) -> UserError:
    turn = on_one_line(f"{message.role}: {message.content[:60]}")
    return UserError(
        f"data.conversations: the tokenizer's chat format changes more than the text of a turn: {turn}",
        "Take what the format treats on its own, such as a <think> block, out of the turns.",
    )
