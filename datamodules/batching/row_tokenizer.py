"""Rows as token ids: instructions and events of a history, then its branch."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.batching.token_cache import Columns
from datamodules.corpus.records import Event
from datamodules.errors import UserError
from datamodules.prompting.segments import Segment, SegmentTokenizer, truncate
from datamodules.prompting.templates import Template, render_history, rendered_digest

ROW_COLUMNS: Columns = {"input_ids": ["int32"], "last_segment": "int32"}  # of `RowTokenizer.encode_all`
FIRST_EVENTS = 32  # rendered at once; doubled until they fill a row


@dataclass(frozen=True)
class RowIds:
    """A tokenized row.

    Attributes:
        input_ids: Token ids.
        last_segment: Position at which the last segment of the branch begins.
        truncated: Whether the row lost its oldest events.
    """

    input_ids: list[int]
    last_segment: int
    truncated: bool


@dataclass(frozen=True)
class RowTokenizer:
    """Tokenizes rows.

    Attributes:
        template: Renders the history.
        segmenter: Tokenizes segments.
        end: Token ids that end every row.
        max_length: Maximum number of tokens of a row.
        branch_length: Number of tokens that every row reserves for its branch and `end`.
        branch_name: What a branch is, for messages: proposal or answer.
        branch: Renders the branch of a row.
    """

    template: Template
    segmenter: SegmentTokenizer
    end: list[int]
    max_length: int
    branch_length: int
    branch_name: str
    branch: Callable[[Any], list[Segment]]

    def rendered_digest(self, rows: Sequence[Any]) -> str:
        """Return a digest of the text of rows, as far as it can fit into `max_length` tokens."""
        rendered = hashlib.sha256()
        for row in rows:
            # An event has at least one token, so older events than these never fit into a row.
            rendered.update(rendered_digest(self.template, row.history[-self.max_length :]))
            rendered.update(repr(self.branch(row)).encode())
        return rendered.hexdigest()

    def encode_all(self, rows: Sequence[Any], split: str, counts: Counter[str]) -> Iterator[Mapping[str, Any]]:
        """Yield `ROW_COLUMNS` of the rows of a split, and count those that are truncated."""
        for index, row in enumerate(rows):
            found = self.encode(row.history, self.branch(row), f"row {index} of the {split} split")
            counts["truncated"] += found.truncated
            yield {"input_ids": found.input_ids, "last_segment": found.last_segment}

    def divided_otherwise(self, rows: Sequence[Any]) -> int:
        """Count rows whose text has other token ids as a whole than in segments."""
        found = 0
        for row in rows:
            segments = [*render_history(self.template, row.history[-FIRST_EVENTS:]), *self.branch(row)]
            whole = self.segmenter.encode([tuple(part for segment in segments for part in segment)])[0]
            found += whole != [token for ids in self.segmenter.encode(segments) for token in ids]
        return found

    def encode(self, history: Sequence[Event], branch: Sequence[Segment], where: str) -> RowIds:
        """Tokenize one row.

        Args:
            history: Events in time order. The oldest are dropped if the row would exceed `max_length`.
            branch: The segments after the history.
            where: Which row this is, for messages.

        Raises:
            UserError: Instructions and branch alone exceed `max_length`.
        """
        prefix = self.segmenter.prefix
        room = self.max_length - len(prefix)
        recent, skipped = self._recent_segments(history, room)
        *before, last = self.segmenter.encode(branch, continues=True)
        tail = [token for segment in (*before, last, self.end) for token in segment]
        ids, dropped = truncate([*recent, tail], room, self.branch_length)
        ids = [*prefix, *ids]
        if len(ids) > self.max_length:
            raise UserError(
                f"data.max_length: instructions and {self.branch_name} of {where} take {len(ids)} tokens, more than "
                f"{self.max_length}",
                "Use a greater max_length or a shorter prompt.",
            )
        return RowIds(ids, len(ids) - len(self.end) - len(last), skipped + dropped > 0)

    def _recent_segments(self, history: Sequence[Event], room: int) -> tuple[list[list[int]], int]:
        """Tokenize the instructions and enough of the last events to fill `room` tokens.

        Returns:
            The token ids of each segment, and the number of older events that were not rendered.
        """
        number = FIRST_EVENTS
        while True:
            segments = self.segmenter.encode(render_history(self.template, history[-number:]))
            if number >= len(history) or sum(map(len, segments[1:])) > room:
                return segments, max(len(history) - number, 0)
            number *= 2
