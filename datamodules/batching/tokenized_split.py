"""The tokenized rows of a split."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

from datamodules.batching.prefix_tree import Integers

Stage = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class TokenizedSplit:
    """The N tokenized rows of a split.

    Attributes:
        input_ids: Token ids of each row.
        scenes: Scene of each row.
        token_digest: Digest of all token ids and of the positions that are learned.
        columns: More fields of each row for its batch, tensors (N, ...) by name.
        answers: Positions of the learned tokens in each row; None for rows with a label.
        groups: (G, K) indices of the rows of each group, which stay in one micro-batch; None for single rows.
        group_weight: (G,) float32, the weight of each group in the mean of a step.
        sampling_weights: Relative frequency of each row in an epoch; None if every row comes once.
    """

    input_ids: Sequence[Sequence[int]]
    scenes: Sequence[str]
    token_digest: str
    columns: dict[str, Tensor] = field(default_factory=dict)
    answers: Sequence[Integers] | None = None
    groups: Integers | None = None
    group_weight: Tensor | None = None
    sampling_weights: Sequence[float] | None = None

    @cached_property
    def lengths(self) -> Integers:
        """Number of tokens of each row, (N,)."""
        return np.fromiter(map(len, self.input_ids), dtype=np.int64)

    @cached_property
    def item_scenes(self) -> Sequence[str]:
        """Scene of each item of a training step: of each row, or of each group by its first row."""
        return self.scenes if self.groups is None else [self.scenes[row] for row in self.groups[:, 0].tolist()]

    @property
    def item_weights(self) -> Sequence[float] | None:
        """Weight of each item in the mean of a step: its number of targets, or the group's weight; None for 1 each."""
        if self.group_weight is not None:
            return self.group_weight.tolist()
        return None if self.answers is None else [len(positions) for positions in self.answers]

    @cached_property
    def digest(self) -> str:
        """Digest of everything that training on these rows depends on: tokens, learned positions, columns, order."""
        digest = hashlib.sha256(json.dumps([self.token_digest, list(self.scenes)]).encode())
        if self.groups is not None and self.group_weight is not None:
            digest.update(self.groups.tobytes() + self.group_weight.numpy().tobytes())
        for name, column in sorted(self.columns.items()):
            digest.update(name.encode() + column.numpy().tobytes())
        return digest.hexdigest()
