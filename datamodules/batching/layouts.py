"""How the rows of a micro-batch are laid out for the backbone: padded rows, or prefix trees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from datamodules.batching.prefix_tree import Integers, PrefixOrder, build_tree, split


class Inputs(TypedDict):
    """What a backbone reads of R rows: padded rows with an attention mask, or one tree with the other fields."""

    input_ids: Tensor  # (R, T) int64, padded on the right; of a tree (1, T)
    attention_mask: NotRequired[Tensor]  # (R, T) int64, 1 for real tokens
    position_ids: NotRequired[Tensor]  # (1, T) int64
    subtree_end: NotRequired[Tensor]  # (1, T) int64, see Tree
    read_out: NotRequired[Tensor]  # (R,) int64, where the rows' last tokens are


class AnswerTokens(TypedDict):
    """The tokens of R rows' answers: L distinct ones, which stand in rows P times in all."""

    predicted_at: Tensor  # (L,) int64, which state, of all rows' one after the other, predicts each token
    target: Tensor  # (L,) int64, token ids
    pair_token: Tensor  # (P,) int64, 0 to L - 1
    pair_row: Tensor  # (P,) int64, 0 to R - 1


@dataclass(frozen=True)
class LaidOut:
    """Rows as the backbone reads them, in the order of its outputs; `answers` if the layout knows of any."""

    rows: Sequence[int]
    inputs: Inputs
    answers: AnswerTokens | None


class Layout(Protocol):
    """How the rows of a micro-batch are laid out for the backbone.

    Those below take all rows' token ids, and of each row's answer, if there are any to learn, the places of its
    tokens in the row, above 0.
    """

    def split(self, rows: Sequence[int], ranks: int) -> list[list[int]]:
        """Divide rows into micro-batches that fit; at most the last `ranks` - 1 places of a round stay empty."""
        ...

    def lay_out(self, rows: Sequence[int]) -> LaidOut:
        """The rows of a micro-batch for the backbone."""
        ...


class RowsLayout:
    """Row by row: rows of similar length together, padded."""

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
            mine = [self.answers[row] for row in rows]
            pair_row = np.repeat(np.arange(len(rows)), [len(places) for places in mine])
            place = np.concatenate(mine) + pair_row * width
            answers = AnswerTokens(
                predicted_at=torch.from_numpy(place - 1),
                target=input_ids.flatten()[torch.from_numpy(place)],
                pair_token=torch.arange(len(place)),
                pair_row=torch.from_numpy(pair_row),
            )
        return LaidOut(rows, inputs, answers)


class TreeLayout:
    """As prefix trees of at most `token_budget` tokens; for `pair_cost` see `tree.split`."""

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
        return [[rows[place] for place in part] for part in parts]

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
            place, pair_token = np.unique(tree.answer_place, return_inverse=True)
            answer_tokens = AnswerTokens(
                predicted_at=torch.from_numpy(tree.parent[place]),
                target=torch.from_numpy(tree.input_ids[place]),
                pair_token=torch.from_numpy(pair_token),
                pair_row=torch.from_numpy(tree.answer_branch),
            )
        return LaidOut([rows[place] for place in tree.rows], inputs, answer_tokens)

    def _order(self, rows: Sequence[int]) -> PrefixOrder:
        """Of these rows alone: all rows' token ids may be more than memory holds."""
        return PrefixOrder([self.input_ids[row] for row in rows])


def ancestors(subtree_end: Tensor) -> Tensor:
    """The attention mask of a tree: each token sees itself and its ancestors.

    Args:
        subtree_end: (T,) int64, see `Tree`.

    Returns:
        (T, T) bool; entry (q, k) says whether query q sees key k.
    """
    place = torch.arange(len(subtree_end), device=subtree_end.device)
    return (place[None, :] <= place[:, None]) & (place[:, None] < subtree_end[None, :])
