"""Segments of a prompt and their token ids. Text from data never becomes a special token."""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Data:
    """Text from data, which never becomes special tokens."""

    text: str


Segment = tuple[str | Data, ...]  # texts of the template (str) and of the data


class SegmentTokenizer:
    """Tokenizes segments. Each distinct text is tokenized once.

    Special tokens come from the template only. `prefix` and `suffix` are the token ids that the tokenizer adds around a
    text: [CLS] and [SEP], a beginning-of-text token, or none.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        # Otherwise "<tool_call>" in the data would become one token, because some added tokens are not special.
        plain = json.loads(tokenizer.backend_tokenizer.to_str())
        plain["added_tokens"] = [{**token, "special": True} for token in plain["added_tokens"]]
        self._plain = Tokenizer.from_str(json.dumps(plain))
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = True  # splits special tokens in a text into ordinary ones
        special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, special))})") if special else None
        self._control, self._spelled = _control_tokens(tokenizer)
        self._ids: dict[str, list[int]] = {}
        bare = self._tokenize(["a"])[0]
        full = list(tokenizer("a").input_ids)
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        self.prefix, self.suffix = full[:start], full[start + len(bare) :]

    def encode(self, segments: Iterable[Segment]) -> list[list[int]]:
        """Return the token ids of each segment, without prefix and suffix."""
        split = [self._split(segment) for segment in segments]
        unknown = list({p for parts in split for p in parts if isinstance(p, str) and p not in self._ids})
        if unknown:
            self._ids.update(zip(unknown, self._tokenize(unknown), strict=True))
        return [[i for p in parts for i in (self._ids[p] if isinstance(p, str) else [p])] for parts in split]

    def _split(self, segment: Segment) -> list[str | int]:
        """Split a segment into texts and special token ids. Adjacent texts are joined."""
        parts: list[str | int] = []

        def add_text(text: str) -> None:
            if parts and isinstance(parts[-1], str):
                parts[-1] += text
            elif text:
                parts.append(text)

        for part in segment:
            if isinstance(part, Data) or self._special is None:
                add_text(part.text if isinstance(part, Data) else part)
                continue
            for index, piece in enumerate(self._special.split(part)):
                if index % 2:
                    parts.append(self.tokenizer.convert_tokens_to_ids(piece))
                else:
                    add_text(piece)
        return parts

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids of texts, without control tokens.

        In Unigram, WordLevel and some WordPiece models, control tokens are ordinary vocabulary, so a text that spells
        one would become it, also in full-width letters. Such a text is split within that word, and its parts are
        tokenized separately.
        """
        encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [self._without_control(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _without_control(self, text: str, encoding: Any) -> list[int]:
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        taken = [span for token, span in spans if self._is_control(token, text[slice(*span)])]
        if not taken:
            return list(encoding.ids)
        single_characters = {
            begin: end for begin, end in taken if end - begin == 1
        }  # single characters, which cannot be split
        cuts = sorted({0, len(text), *single_characters.values(), *((begin + end) // 2 for begin, end in taken)})
        parts = [_escaped(text[a:b]) if a in single_characters else text[a:b] for a, b in pairwise(cuts)]
        return [token for ids in self._tokenize(parts) for token in ids]

    def _is_control(self, token: int, written: str) -> bool:
        if token in self._spelled:
            return self._spelled[token] in unicodedata.normalize("NFKC", written).casefold()
        return token in self._control


def _control_tokens(tokenizer: "PreTrainedTokenizerFast") -> tuple[set[int], dict[int, str]]:
    """Return the tokens that are forbidden in text from data.

    Returns:
        The ids of special and added tokens, except white space. And the spelling by id of tokens that only their own
        spelling must not become: the token of unknown words, and bytes such as <0x0A>.
    """
    added = {token: number for token, number in tokenizer.get_added_vocab().items() if token.strip(" \t\r\n\u2581")}
    control = {*added.values(), *tokenizer.all_special_ids}
    spelled = {number: token.casefold() for token, number in tokenizer.get_vocab().items() if _BYTE.fullmatch(token)}
    if tokenizer.unk_token is not None:
        spelled[tokenizer.unk_token_id] = str(tokenizer.unk_token).casefold()
    return control, spelled


def _escaped(character: str) -> str:
    """Escape a character that is a control token as JSON does."""
    if character in r"\u0123456789abcdef":
        raise UserError(f"the tokenizer has {character!r} as a special token", "Use a tokenizer without it.")
    return f"\\u{ord(character):04x}"


def truncate(segments_ids: Sequence[Sequence[int]], limit: int, branch_length: int = 0) -> tuple[list[int], int]:
    """Join the token ids of a row's segments, dropping the oldest events beyond `limit` tokens.

    Args:
        segments_ids: Token ids of the instructions, of each event in time order, and of the proposal.
        limit: Maximum number of tokens. Instructions and proposal are kept even if they exceed it.
        branch_length: Tokens reserved for the proposal. So all rows of a history keep the same events, unless a
            proposal is longer.

    Returns:
        The joined ids and the number of events dropped.
    """
    first, *events, last = segments_ids
    room = limit - len(first) - max(len(last), branch_length)
    dropped = len(events)
    while dropped and len(events[dropped - 1]) <= room:
        dropped -= 1
        room -= len(events[dropped])
    return [token for part in (first, *events[dropped:], last) for token in part], dropped


def plain_text(segment: Segment) -> str:
    """Return the text of a segment."""
    return "".join(part.text if isinstance(part, Data) else part for part in segment)
