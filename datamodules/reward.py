"""RewardDataModule: annotated rows as micro-batches for a reward classifier."""

from collections import Counter
from typing import Any, Literal

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.prompts import PromptTemplate, render, training_text, truncate
from datamodules.records import AnnotatedRow
from datamodules.rows import Encoded, RowsDataModule, Stage, cached_map, log, rows_digest
from datamodules.sources import Corpus
from datamodules.splits import Split, split_by_scene, split_published
from datamodules.tokenizer import tokenizer_state
from datamodules.tree import Integers


class RewardDataModule(RowsDataModule):
    """Annotated rows: a history, a proposal, and whether it was accepted.

    Args:
        balance: "category" draws training rows so that all categories are equally frequent.
        options: See RowsDataModule.
    """

    template_class = PromptTemplate
    template: PromptTemplate
    settled = (*RowsDataModule.settled, "balance")

    def __init__(self, balance: Literal["none", "category"] = "none", **options: Any) -> None:
        super().__init__(**options)
        self.balance = balance

    def divide(self, corpus: Corpus) -> Split:
        if self.split_name == "published":
            return split_published(corpus, self.validation_fraction, self.seed)
        return split_by_scene(corpus, self.folds, self.fold, self.seed)

    def training_text(self) -> list[str]:
        return training_text(self.template, self.split.train)

    def encode(self, stage: Stage) -> Encoded:
        rows: list[AnnotatedRow] = getattr(self.split, stage)
        frequency = Counter(row.category for row in rows)
        return Encoded(
            input_ids=self._input_ids(stage, rows) if rows else [],
            scenes=[row.scene for row in rows],
            columns={
                "label": torch.tensor([int(row.accepted) for row in rows], dtype=torch.int64),
                "category": torch.tensor([row.category.number for row in rows], dtype=torch.int64),
            },
            odds=[1 / frequency[row.category] for row in rows] if self.balance == "category" else None,
        )

    def _input_ids(self, stage: Stage, rows: list[AnnotatedRow]) -> list[Any]:
        """The token ids of each row."""
        segmenter = self.segmenter
        room = self.max_length - len(segmenter.prefix) - len(segmenter.suffix)

        def encode(indices: list[int]) -> dict[str, list[Any]]:
            columns: dict[str, list[Any]] = {"input_ids": [], "dropped_events": []}
            for index in indices:
                ids, dropped = truncate(segmenter.encode(render(self.template, rows[index])), room)
                if len(ids) > room:
                    raise UserError(
                        f"data.max_length: instructions and proposal of row {index} of the {stage} split take "
                        f"{len(ids) + self.max_length - room} tokens, more than {self.max_length}",
                        "Use a greater max_length or a shorter prompt.",
                    )
                columns["input_ids"].append([*segmenter.prefix, *ids, *segmenter.suffix])
                columns["dropped_events"].append(dropped)
            return columns

        what = [rows_digest(rows), self.template.model_dump(), tokenizer_state(self.tokenizer), self.max_length]
        encoded = cached_map(len(rows), encode, what, self.cache, f"tokenizing {stage} rows")
        self.note_truncated(stage, encoded["dropped_events"])
        return self._without_padding_at_the_end(stage, list(encoded.with_format("numpy")["input_ids"][:]))

    def _without_padding_at_the_end(self, stage: Stage, rows: list[Integers]) -> list[Integers]:
        """Rows as far as transformers reads them: its classifiers read a row's last token that is no padding token.

        Where the end token also pads, a prompt may end in it; a row of an exported model is then read before it.
        """
        pad = self.tokenizer.pad_token_id
        kept = [row[: np.flatnonzero(row != pad)[-1] + 1] for row in rows]
        shorter = sum(len(row) < len(whole) for row, whole in zip(kept, rows, strict=True))
        if shorter and stage == "train":
            log.info(
                f"data.prompt: {shorter} of {len(rows)} train rows end in {self.tokenizer.pad_token}, which is also "
                "the padding token; they are read at the token before it, as transformers reads them"
            )
        return kept
