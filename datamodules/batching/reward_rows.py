"""RewardDataModule: annotated rows as micro-batches for a reward classifier."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from datamodules.batching.bag_of_words import Decision, marked_words
from datamodules.batching.prefix_tree import Integers
from datamodules.batching.rows import RowsDataModule, log
from datamodules.batching.tokenized_split import Stage, TokenizedSplit
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import PUBLISHED_TEST_DIGEST, Corpus, rows_digest
from datamodules.corpus.splits import Split, split_by_scene, split_published
from datamodules.prompting.segments import Segment
from datamodules.prompting.templates import RewardTemplate, render_proposal, training_text


class RewardDataModule(RowsDataModule):
    """Annotated rows: history, proposal, judgment.

    Args:
        balance: "category" samples training rows so that all categories are equally frequent.
        options: See RowsDataModule.

    Examples:
        >>> data = RewardDataModule(root="embedded", folds=5, fold=0)
        >>> data.setup("fit")
        >>> data.row_counts
        {'train': 1194, 'validation': 406, 'test': 391}
        >>> micro_batches = next(iter(data.train_dataloader()))  # of one optimizer step
        >>> sum(len(micro_batch["label"]) for micro_batch in micro_batches)
        32
    """

    template_class = RewardTemplate
    template: RewardTemplate
    branch_name = "proposal"

    def __init__(self, balance: Literal["none", "category"] = "none", **options: Any) -> None:
        super().__init__(**options)
        self.balance = balance

    def divide(self, corpus: Corpus) -> Split:
        if self.split_name == "published":
            return split_published(corpus, self.validation_fraction, self.seed)
        return split_by_scene(corpus, self.folds, self.fold, self.seed)

    def decisions(self, rows: Sequence[AnnotatedRow]) -> list[Decision]:
        """Return for each row whether its proposal is accepted."""
        return [(marked_words(row.history, row.proposal), row.accepted) for row in rows]

    @property
    def tests_published_rows(self) -> bool:  # type: ignore[override]
        """Whether the test rows are those of the published metrics."""
        return self.split_name == "published" and rows_digest(self.split.test) == PUBLISHED_TEST_DIGEST

    def training_text(self) -> list[str]:
        return training_text(self.template, self.split.train)

    def branch(self, row: AnnotatedRow) -> list[Segment]:
        return [render_proposal(self.template, row.proposal)]

    @property
    def end(self) -> list[int]:
        return self.segmenter.suffix

    def encode(self, stage: Stage) -> TokenizedSplit:
        rows: list[AnnotatedRow] = getattr(self.split, stage)
        found = self.tokenize(stage, rows)
        frequency = Counter(row.category for row in rows)
        return TokenizedSplit(
            input_ids=self._without_padding_at_the_end(stage, list(found.rows.with_format("numpy")["input_ids"][:])),
            scenes=[row.scene for row in rows],
            token_digest=found.digest,
            columns={
                "label": torch.tensor([int(row.accepted) for row in rows], dtype=torch.int64),
                "category": torch.tensor([row.category.number for row in rows], dtype=torch.int64),
            },
            sampling_weights=[1 / frequency[row.category] for row in rows] if self.balance == "category" else None,
        )

    def without_padding_at_the_end(self, row: Integers) -> Integers:
        """Return a row up to its last token that is not padding; transformers' classifiers read that token.

        If the end token is also the padding token, a prompt may end in it. The exported model then reads the token
        before it.
        """
        return row[: np.flatnonzero(row != self.tokenizer.pad_token_id)[-1] + 1]

    def _without_padding_at_the_end(self, stage: Stage, rows: list[Integers]) -> list[Any]:
        kept = [self.without_padding_at_the_end(row) for row in rows]
        shorter = sum(len(after) < len(before) for after, before in zip(kept, rows, strict=True))
        if shorter and stage == "train":
            log.info(
                f"data.prompt: {shorter} of {len(rows)} train rows end in {self.tokenizer.pad_token}, which is also "
                "the padding token; the classifier reads the token before it, as in transformers"
            )
        return kept
