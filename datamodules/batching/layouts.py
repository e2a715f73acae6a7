"""Layouts of a micro-batch: padded rows, or a prefix tree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from datamodules.batching.prefix_tree import Integers, PrefixOrder, build_tree, split


class Inputs(TypedDict):
    """Input of a backbone for R rows: padded rows with an attention mask, or one tree with the other fields."""

    input_ids: Tensor  # (R, T) int64, padded on the right; (1, T) for a tree
    attention_mask: NotRequired[Tensor]  # (R, T) int64, 1 for tokens, 0 for padding
    position_ids: NotRequired[Tensor]  # (1, T) int64
    subtree_end: NotRequired[Tensor]  # (1, T) int64, see Tree
    read_out: NotRequired[Tensor]  # (R,) int64, positions of the rows' last tokens


class AnswerTokens(TypedDict):
    """Answer tokens of R rows: L positions to predict, in P pairs of a token and a row that contains it."""

    predicted_at: Tensor  # (L,) int64, position of the predicting state, in the states of all rows one after the other
    target: Tensor  # (L,) int64, token ids
    pair_token: Tensor  # (P,) int64, 0 to L - 1
    pair_row: Tensor  # (P,) int64, 0 to R - 1


@dataclass(frozen=True)
class LaidOut:
    """The input for some rows, with the rows in the order of outputs; `answers` is None for rows with a label."""

    rows: Sequence[int]
    inputs: Inputs
    answers: AnswerTokens | None


class Layout(Protocol):
    """Divides rows into micro-batches and makes the input of each.

    Constructors take the token ids of all rows and, for agents, the positions of each row's answer tokens, which are
    above 0.
    """

    def split(self, rows: Sequence[int], ranks: int) -> list[list[int]]:
        """Divide rows into micro-batches; in the last round, fewer than `ranks` ranks may stay without one."""
        ...

    def lay_out(self, rows: Sequence[int]) -> LaidOut:
        """Make the input of a micro-batch."""
        ...


class RowsLayout:
    """Padded rows; rows of similar length form a micro-batch."""

    def __init__(
        self,
        input_ids: Sequence[Sequence[int]],
        pad_id: int,
        micro_batch_size: int,
        answers: Sequence[Integers] | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.pad_id = pad_id
        self.micro_batch_size = micro_batch_size
        self.answers = answers

    def split(self, rows: Sequence[int], ranks: int) -> list[list[int]]:
        by_length = sorted(rows, key=lambda row: len(self.input_ids[row]))
        rounds = -(-len(rows) // (self.micro_batch_size * ranks))
        size = -(-len(rows) // (rounds * ranks))
        return [by_length[start : start + size] for start in range(0, len(rows), size)]

    def lay_out(self, rows: Sequence[int]) -> LaidOut:
        ids = [torch.as_tensor(self.input_ids[row], dtype=torch.int64) for row in rows]
        lengths = torch.tensor([len(row) for row in ids])
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
        width = input_ids.shape[1]
        inputs = Inputs(input_ids=input_ids, attention_mask=(torch.arange(width) < lengths[:, None]).long())
        answers = None
        if self.answers is not None:
            positions = [self.answers[row] for row in rows]
            pair_row = np.repeat(np.arange(len(rows)), list(map(len, positions)))
            position = np.concatenate(positions) + pair_row * width
            answers = AnswerTokens(
                predicted_at=torch.from_numpy(position - 1),
                target=input_ids.flatten()[torch.from_numpy(position)],
                pair_token=torch.arange(len(position)),
                pair_row=torch.from_numpy(pair_row),
            )
        return LaidOut(rows, inputs, answers)


class TreeLayout:
    """Prefix trees of at most `token_budget` tokens; for `pair_cost` see `prefix_tree.split`."""

    def __init__(
        self,
        input_ids: Sequence[Sequence[int]],
        token_budget: int,
        pair_cost: float = 0.0,
        answers: Sequence[Integers] | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.token_budget = token_budget
        self.pair_cost = pair_cost
        self.answers = answers

    def split(self, rows: Sequence[int], ranks: int) -> list[list[int]]:
        parts = split(self._order(rows), range(len(rows)), self.token_budget, ranks, self.pair_cost)
        return [[rows[index] for index in part] for part in parts]

    def lay_out(self, rows: Sequence[int]) -> LaidOut:
        answers = None if self.answers is None else [self.answers[row] for row in rows]
        tree = build_tree(self._order(rows), range(len(rows)), answers)
        inputs = Inputs(
            input_ids=torch.from_numpy(tree.input_ids)[None],
            position_ids=torch.from_numpy(tree.position_ids)[None],
            subtree_end=torch.from_numpy(tree.subtree_end)[None],
            read_out=torch.from_numpy(tree.read_out),
        )
        answer_tokens = None
        if answers is not None:
            position, pair_token = np.unique(tree.answer_position, return_inverse=True)
            answer_tokens = AnswerTokens(
                predicted_at=torch.from_numpy(tree.parent[position]),
                target=torch.from_numpy(tree.input_ids[position]),
                pair_token=torch.from_numpy(pair_token),
                pair_row=torch.from_numpy(tree.answer_branch),
            )
        return LaidOut([rows[index] for index in tree.rows], inputs, answer_tokens)

    def _order(self, rows: Sequence[int]) -> PrefixOrder:
        """Sort only these rows: the token ids of all rows may not fit into memory."""
        return PrefixOrder([self.input_ids[row] for row in rows])


def ancestors(subtree_end: Tensor) -> Tensor:
    """The attention mask of a tree: each token sees itself and its ancestors.

    Args:
        subtree_end: (T,) int64, see `Tree`.

    Returns:
        (T, T) bool; entry (q, k) says whether query q sees key k.
    """
    position = torch.arange(len(subtree_end), device=subtree_end.device)
    return (position[None, :] <= position[:, None]) & (position[:, None] < subtree_end[None, :])
