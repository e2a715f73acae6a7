"""Tokenized conversations of a split."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from datamodules.batching.token_cache import Columns
from datamodules.corpus.conversations import contains_event, event_pattern, read_conversations
from datamodules.corpus.splits import validates
from datamodules.corpus.tables import Tables
from datamodules.prompting.conversation_tokenizer import ConversationTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLUMNS: Columns = {"input_ids": ["int32"], "answer": ["int32"], "scene": "string"}
REWRITTEN = "rewritten"  # among the counts, conversations that are learned with changed texts


def conversation_rows(
    sources: Sequence[Tables],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    max_length: int,
    validation: bool,
    validation_fraction: float,
    held_out_events: Sequence[str] | None,
    counts: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yield the tokenized conversations of the training or validation split.

    Args:
        sources: Sources of conversations.
        tokenizer: Tokenizes them in its chat format.
        max_length: Maximum number of tokens of a conversation.
        validation: Whether to yield the validation split.
        validation_fraction: Share of the conversations that validate. Conversations with the same beginning have the
            same scene, and so the same split.
        held_out_events: Conversations that contain one of these events are left out; None to leave none out.
        counts: Counts the conversations that are left out, by reason, and those that are rewritten. In training it
            also counts what was converted, in both splits.
    """
    conversation_tokenizer = ConversationTokenizer(tokenizer, max_length)
    guard = None if held_out_events is None else event_pattern(held_out_events)
    for tables in sources:
        for conversation in read_conversations(tables, None if validation else counts):  # both splits read all of them
            if validates(conversation.scene, validation_fraction) is not validation:
                continue
            if contains_event(conversation, guard):
                counts["with events of test scenes"] += 1
            elif (encoded := conversation_tokenizer.encode(conversation)) is None:
                counts["too long"] += 1
            elif encoded[1]:
                yield {"input_ids": encoded[0], "answer": encoded[1], "scene": conversation.scene}
            else:
                counts["whose last answer is empty in the chat format"] += 1
    counts[REWRITTEN] += conversation_tokenizer.rewritten
