"""HistoryDataModule: histories, after which an agent writes answers of its own while it trains."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from datamodules.batching.answer_rows import AnswerKind, AnswersDataModule, Example, probes
from datamodules.batching.rows import Stage
from datamodules.batching.tokenized_split import TokenizedSplit
from datamodules.corpus.records import AnnotatedRow, Event
from datamodules.errors import UserError
from datamodules.prompting.segments import truncate
from datamodules.ranges import Count


class HistoryDataModule(AnswersDataModule):
    """The distinct histories of annotated rows. A step of training has `batch_size` of them.

    Args:
        max_new_tokens: Maximum number of tokens of an answer. Set by model.max_new_tokens.
        options: See AnswersDataModule. `annotated` must be true.
    """

    def __init__(self, max_new_tokens: Count = 64, **options: Any) -> None:
        super().__init__(**options)
        self.max_new_tokens = max_new_tokens
        if not self.annotated:
            raise UserError("data.annotated: online training needs histories", "Leave data.annotated out.")

    def rows(self, stage: Stage) -> list[Example]:
        """Return one row for each history; for validation and test those for which it is known if help was needed."""
        rows: list[AnnotatedRow] = getattr(self.split, stage)
        if stage != "train":
            return probes(rows)
        of_history = {row.history_digest: row for row in rows}
        return [Example(row.history, None, AnswerKind.HISTORY, None, row.scene) for row in of_history.values()]

    def encode(self, stage: Stage) -> TokenizedSplit:
        return self.encode_answers(stage) if stage == "validation" else super().encode(stage)  # it has no answers

    @cached_property
    def branch_length(self) -> int:
        """Leaves room for an answer of `max_new_tokens`."""
        longest = super().branch_length
        return longest if self._saved is not None else max(longest, len(self.generation_prompt()) + self.max_new_tokens)

    def prompt(self, history: Sequence[Event]) -> list[int]:
        """Return the token ids before an answer, as generation has them."""
        return truncate([*self.segments(history), self.generation_prompt()], self.prompt_length)[0]
