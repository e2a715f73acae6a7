"""Segments of a prompt and their token ids. Text from data never becomes a special token."""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from datamodules.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_OTHER_TEXT = "\ue000"  # a character that no tokenizer joins with its neighbours
_WHITE_SPACE = " \t\r\n\u2581"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Data:
    """Text from data, which never becomes special tokens."""

    text: str


Segment = tuple[str | Data, ...]  # texts of the template (str) and of the data


class SegmentTokenizer:
    """Tokenizes segments. Each distinct text is tokenized once.

    Special tokens come from the template only.

    Args:
        tokenizer: The tokenizer.
        chat: Whether the template is in chat format. It contains all special tokens, so there are no prefix and suffix.
            A tokenizer that marks the beginning of a text, such as Llama 2's, does not mark that of each segment.

    Attributes:
        prefix: Token ids that the tokenizer adds before a text: [CLS], a beginning-of-text token, or none.
        suffix: Token ids that it adds after a text: [SEP], or none.
        unmarked: Kinds of neighbours, "text" or a special "token". A text that follows such a neighbour gets no
            beginning-of-text mark, although a text alone gets one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, chat: bool = False) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        # Otherwise "<tool_call>" in the data would become one token, because some added tokens are not special.
        plain = json.loads(tokenizer.backend_tokenizer.to_str())
        plain["added_tokens"] = [{**token, "special": True} for token in plain["added_tokens"]]
        self._plain = Tokenizer.from_str(json.dumps(plain))
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = True  # splits special tokens in a text into ordinary ones
        self._special = _special_pattern(tokenizer)
        self._added = tokenizer.get_added_vocab()
        self._control, self._spelled = _control_tokens(tokenizer)
        self._ids: dict[tuple[str, bool], list[int]] = {}
        self.unmarked: tuple[str, ...] = ()
        bare = self._tokenize(["a"])[0]
        full = list(tokenizer("a").input_ids)
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        self.prefix, self.suffix = full[:start], full[start + len(bare) :]
        if chat:
            self.prefix, self.suffix = [], []
            within, special = self._tokenize(["a"], within=True)[0], special_tokens(tokenizer)
            if within != bare:
                after = tokenizer(f"{special[0]}a", add_special_tokens=False).input_ids[1:] if special else bare
                self.unmarked = ("text", "token") if after == within else ("text",)

    def encode(self, segments: Iterable[Segment], *, continues: bool = False) -> list[list[int]]:
        """Return the token ids of each segment, without prefix and suffix.

        Args:
            segments: Consecutive segments.
            continues: Whether they follow other segments. If not, the first one begins a row.
        """
        row: list[list[tuple[str, bool] | int]] = []
        before = "text" if continues else None
        for segment in segments:
            row.append([])
            for part in self._split(segment):
                row[-1].append((part, before in self.unmarked) if isinstance(part, str) else part)
                before = "text" if isinstance(part, str) else "token"
        unknown = {part for parts in row for part in parts if isinstance(part, tuple) and part not in self._ids}
        for within in (False, True):
            texts = [part for part in unknown if part[1] is within]
            found = self._tokenize([text for text, _ in texts], within) if texts else []
            self._ids.update(zip(texts, found, strict=True))
        return [[i for p in parts for i in (self._ids[p] if isinstance(p, tuple) else [p])] for parts in row]

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
                    token = piece if piece in self._added else piece.strip()  # with the white space that it takes
                    parts.append(self._added[token])
                else:
                    add_text(piece)
        return parts

    def _tokenize(self, texts: Sequence[str], within: bool = False) -> list[list[int]]:
        """Return token ids of texts, without control tokens; `within` as if other text stood before them.

        In Unigram, WordLevel and some WordPiece models, control tokens are ordinary vocabulary, so a text that spells
        one would become it, also in full-width letters. Such a text is split within that word, and its parts are
        tokenized separately.
        """
        before = _OTHER_TEXT if within else ""
        encodings = self._plain.encode_batch([before + text for text in texts], add_special_tokens=False)
        found = []
        for text, encoding in zip(texts, encodings, strict=True):
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            kept = [(i, (a - len(before), b - len(before))) for i, (a, b) in spans if a >= len(before)]
            found.append(self._without_control(text, kept, within))
        return found

    def _without_control(self, text: str, spans: list[tuple[int, tuple[int, int]]], within: bool) -> list[int]:
        taken = [span for token, span in spans if self._is_control(token, text[slice(*span)])]
        if not taken:
            return [token for token, _ in spans]
        single_characters = {begin: end for begin, end in taken if end - begin == 1}  # they cannot be split
        cuts = sorted({0, len(text), *single_characters.values(), *((begin + end) // 2 for begin, end in taken)})
        parts = [_escaped(text[a:b]) if a in single_characters else text[a:b] for a, b in pairwise(cuts)]
        return [token for ids in self._tokenize(parts, within) for token in ids]

    def _is_control(self, token: int, written: str) -> bool:
        if token in self._spelled:
            return self._spelled[token] in unicodedata.normalize("NFKC", written).casefold()
        return token in self._control


def special_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return the special and added tokens, except white space."""
    tokens = dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()])
    return [token for token in tokens if token.strip(_WHITE_SPACE)]


def _special_pattern(tokenizer: "PreTrainedTokenizerFast") -> re.Pattern[str] | None:
    """Return a pattern of the added tokens, with the white space that some of them take with them."""
    tokens = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: len(token.content), reverse=True)
    space = r"\s*"
    patterns = [f"{space * t.lstrip}{re.escape(t.content)}{space * t.rstrip}" for t in tokens]
    return re.compile(f"({'|'.join(patterns)})") if patterns else None


def _control_tokens(tokenizer: "PreTrainedTokenizerFast") -> tuple[set[int], dict[int, str]]:
    """Return the tokens that are forbidden in text from data.

    Returns:
        The ids of special and added tokens, except white space. And the spelling by id of tokens that only their own
        spelling must not become: the token of unknown words, and bytes such as <0x0A>.
    """
    added = {token: number for token, number in tokenizer.get_added_vocab().items() if token.strip(_WHITE_SPACE)}
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
