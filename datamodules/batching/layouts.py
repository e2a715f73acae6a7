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
    """The input of a backbone for some items, and what is needed to read its outputs.

    Attributes:
        rows: The rows in the order of outputs.
        inputs: The input of the backbone.
        answers: The answer tokens; None for rows with a label.
        groups: (G, K) int64, for each group that was laid out the positions of its rows in `rows`; None without groups.
    """

    rows: Sequence[int]
    inputs: Inputs
    answers: AnswerTokens | None
    groups: Tensor | None = None


class Layout(Protocol):
    """Divides items into micro-batches and makes the input of each.

    Items are rows, or groups of rows that stay in one micro-batch, such as the two answers of a preference.
    Constructors take the token ids of all rows; for agents, the positions of each row's answer tokens, which are above
    0; and for groups, the rows of each, (G, K).
    """

    def split(self, items: Sequence[int], ranks: int) -> list[list[int]]:
        """Divide items into micro-batches; in the last round, fewer than `ranks` ranks may stay without one."""
        ...

    def lay_out(self, items: Sequence[int]) -> LaidOut:
        """Make the input of a micro-batch. A row of several groups is in it once."""
        ...


def _rows_of(items: Sequence[int], groups: Integers | None) -> tuple[Integers, Integers]:
    """The distinct rows of some items, and for each item the indices of its rows among them, (G, K)."""
    if groups is None:
        return np.asarray(items, dtype=np.int64), np.arange(len(items))[:, None]
    rows, index = np.unique(groups[np.asarray(items, dtype=np.int64)], return_inverse=True)
    return rows, index.reshape(len(items), -1)


def _positions(index: Integers, order: Integers, groups: Integers | None) -> Tensor | None:
    """The positions of the rows of groups in the outputs, (G, K), where `order` lists the index of each output."""
    return None if groups is None else torch.from_numpy(np.argsort(order)[index])


class RowsLayout:
    """Padded rows; rows of similar length form a micro-batch."""

    def __init__(
        self,
        input_ids: Sequence[Sequence[int]],
        pad_id: int,
        micro_batch_size: int,
        answers: Sequence[Integers] | None = None,
        groups: Integers | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.pad_id = pad_id
        self.micro_batch_size = micro_batch_size
        self.answers = answers
        self.groups = groups

    def split(self, items: Sequence[int], ranks: int) -> list[list[int]]:
        by_length = sorted(items, key=self._longest)
        largest = max(self.micro_batch_size // (1 if self.groups is None else self.groups.shape[1]), 1)
        rounds = -(-len(items) // (largest * ranks))
        size = -(-len(items) // (rounds * ranks))
        return [by_length[start : start + size] for start in range(0, len(items), size)]

    def _longest(self, item: int) -> int:
        rows = [item] if self.groups is None else self.groups[item]
        return max(len(self.input_ids[row]) for row in rows)

    def lay_out(self, items: Sequence[int]) -> LaidOut:
        chosen, index = _rows_of(items, self.groups)
        rows = chosen.tolist()
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
        return LaidOut(rows, inputs, answers, _positions(index, np.arange(len(rows)), self.groups))


class TreeLayout:
    """Prefix trees of at most `token_budget` tokens; for `pair_cost` see `prefix_tree.split`."""

    def __init__(
        self,
        input_ids: Sequence[Sequence[int]],
        token_budget: int,
        pair_cost: float = 0.0,
        answers: Sequence[Integers] | None = None,
        groups: Integers | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.token_budget = token_budget
        self.pair_cost = pair_cost
        self.answers = answers
        self.groups = groups

    def split(self, items: Sequence[int], ranks: int) -> list[list[int]]:
        rows, index = _rows_of(items, self.groups)
        parts = split(self._order(rows), index, self.token_budget, ranks, self.pair_cost)
        return [[items[number] for number in part] for part in parts]

    def lay_out(self, items: Sequence[int]) -> LaidOut:
        rows, index = _rows_of(items, self.groups)
        answers = None if self.answers is None else [self.answers[row] for row in rows.tolist()]
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
        return LaidOut(rows[tree.rows].tolist(), inputs, answer_tokens, _positions(index, tree.rows, self.groups))

    def _order(self, rows: Integers) -> PrefixOrder:
        """Sort only these rows: the token ids of all rows may not fit into memory."""
        return PrefixOrder([self.input_ids[row] for row in rows.tolist()])


def ancestors(subtree_end: Tensor) -> Tensor:
    """The attention mask of a tree: each token attends to itself and its ancestors.

    Args:
        subtree_end: (T,) int64, see `Tree`.

    Returns:
        (T, T) bool; entry (q, k) says whether query q attends to key k.
    """
    position = torch.arange(len(subtree_end), device=subtree_end.device)
    return (position[None, :] <= position[:, None]) & (position[:, None] < subtree_end[None, :])
