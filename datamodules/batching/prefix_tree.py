"""Prefix trees: rows that begin alike share the computation of what they share.

In a causal backbone, a token's state depends on the tokens before it alone. So rows merge wherever their token
ids agree from the beginning, also inside a segment, and each shared token is computed once: the result is that
of the rows one by one, to rounding. The same thought, elsewhere: Tree Training (arXiv 2511.00413) and prefix
sharing for preference pairs (arXiv 2410.20305).

No tree of nodes is built. Sorted rows are a tree: a row adds the tokens that it does not share with the row
before it, and so the tokens that rows add, one row after the other, are the tree in depth-first order.

Shape legend: N rows of a split, R rows of one tree, T tokens of one tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from datamodules.errors import UserError

Integers = npt.NDArray[np.int64]


class PrefixOrder:
    """The lexicographic order of rows of token ids, and how many tokens neighbours in it share.

    Args:
        input_ids: N rows of token ids, of any lengths above 0.
    """

    def __init__(self, input_ids: Sequence[npt.ArrayLike]) -> None:
        self.input_ids = [np.asarray(ids, dtype=np.int64) for ids in input_ids]
        self.lengths: Integers = np.array([len(ids) for ids in self.input_ids], dtype=np.int64)
        order = sorted(range(len(self.input_ids)), key=lambda row: self.input_ids[row].astype(">u4").tobytes())
        self._rank = np.empty(len(order), dtype=np.int64)
        self._rank[order] = np.arange(len(order))
        pairs = pairwise(order)
        self._shared = np.array([common_prefix(self.input_ids[a], self.input_ids[b]) for a, b in pairs], dtype=np.int64)

    def sorted(self, rows: Sequence[int]) -> Integers:
        """The rows, which may repeat, in this order: (R,)."""
        given = np.asarray(rows, dtype=np.int64)
        return given[np.argsort(self._rank[given], kind="stable")]

    def shared(self, rows: Integers) -> Integers:
        """How many tokens each of some sorted rows shares with the one before it, 0 for the first: (R,)."""
        shared = np.zeros(len(rows), dtype=np.int64)
        if len(rows) > 1:
            rank = self._rank[rows]
            same = rank[1:] == rank[:-1]
            # What two rows share is the least that neighbours from the one to the other share; a row is all its own.
            neighbours = np.append(self._shared[: rank[-1]], self.lengths.max())
            least = np.minimum.reduceat(neighbours, rank[:-1])
            shared[1:] = np.where(same, self.lengths[rows[1:]], least)
        return shared

    def tokens(self, rows: Sequence[int]) -> int:
        """How many tokens the tree of some rows has."""
        ordered = self.sorted(rows)
        return int(self.lengths[ordered].sum() - self.shared(ordered).sum())


@dataclass(frozen=True)
class Tree:
    """Merged rows, their T tokens in depth-first order.

    The ancestors of token q, itself included, are the tokens k with k <= q < subtree_end[k].
    """

    rows: Integers  # (R,) which rows, in the order of their branches
    read_out: Integers  # (R,) where each row's last token is
    input_ids: Integers  # (T,)
    position_ids: Integers  # (T,) how many tokens precede each one in its row
    parent: Integers  # (T,) where the token before each one in its row is; -1 for a first token
    subtree_end: Integers  # (T,) one past the last descendant of each token
    answer_branch: Integers  # (P,) which branch, 0 to R - 1, each of P answer tokens stands in
    answer_place: Integers  # (P,) where that token is: one that several rows share stands here once for each


def build_tree(order: PrefixOrder, rows: Sequence[int], answers: Sequence[Integers] | None = None) -> Tree:
    """Merge rows.

    Args:
        order: The order of all rows.
        rows: Which of them to merge; they may repeat.
        answers: For each row of `order`, which of its tokens, counted from 0, are its answer. None if none are.
    """
    ordered = order.sorted(rows)
    shared = order.shared(ordered)
    lengths = order.lengths[ordered]
    starts = np.concatenate([[0], np.cumsum(lengths - shared)])
    size = int(starts[-1])
    input_ids, position_ids = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    parent, subtree_end = np.arange(-1, size - 1), np.full(size, size, dtype=np.int64)
    answer_places: list[Integers] = []
    path = np.empty(int(lengths.max(initial=0)), dtype=np.int64)  # of the current row: where each of its tokens is
    read_out = np.empty(len(ordered), dtype=np.int64)
    depth = 0
    for number, (row, common, length) in enumerate(zip(ordered, shared, lengths, strict=True)):
        start, end = starts[number], starts[number + 1]
        subtree_end[path[common:depth]] = start  # this row branches off below them
        path[common:length] = np.arange(start, end)
        input_ids[start:end] = order.input_ids[row][common:]
        position_ids[start:end] = np.arange(common, length)
        if end > start:
            parent[start] = path[common - 1] if common else -1
        if answers is not None:
            answer_places.append(path[answers[row]])
        read_out[number] = path[length - 1]
        depth = length
    answer_branch = np.repeat(np.arange(len(answer_places)), [len(places) for places in answer_places])
    answer_place = np.concatenate([*answer_places, np.empty(0, dtype=np.int64)])
    return Tree(ordered, read_out, input_ids, position_ids, parent, subtree_end, answer_branch, answer_place)


def split(
    order: PrefixOrder, rows: Sequence[int], token_budget: int, ranks: int = 1, pair_cost: float = 0.0
) -> list[Integers]:
    """Divide rows into trees within a budget, cut where that makes all of them together cheapest to compute.

    Args:
        order: The order of all rows.
        rows: Which of them to divide; they may repeat.
        token_budget: The greatest number of tokens of one tree; at least the longest row's.
        ranks: How many devices share the trees. Above 1, trees are made as equal as the number that the budget
            needs, rounded up to a multiple of `ranks`, allows; there may be fewer trees than that multiple.
        pair_cost: What attention to one token more costs a token, in units of all else that a token costs: a
            tree of t tokens costs t + pair_cost t^2. Above 0 where attention computes what its mask hides.

    Returns:
        The rows of each tree.

    Raises:
        UserError: A row alone exceeds the budget.
    """
    ordered = order.sorted(rows)
    shared = order.shared(ordered)
    longest = int(order.lengths[ordered].max(initial=0))
    if longest > token_budget:
        raise UserError(
            f"data.token_budget: a row has {longest} tokens, more than {token_budget}",
            "Make token_budget at least data.max_length.",
        )
    added = order.lengths[ordered] - shared
    cuts = _cuts(added, shared, token_budget, pair_cost)
    if ranks > 1:
        trees = -(-len(cuts) // ranks) * ranks
        low, high = longest, token_budget
        while low < high:  # the least cap that needs no more trees
            middle = (low + high) // 2
            if len(tried := _cuts(added, shared, middle, pair_cost)) <= trees:
                cuts, high = tried, middle
            else:
                low = middle + 1
    return np.split(ordered, cuts[1:])


def _cuts(added: Integers, shared: Integers, cap: int, pair_cost: float) -> list[int]:
    """Where each tree begins, such that all together cost the least and none has more than `cap` tokens.

    A tree of rows i to j - 1 has the tokens that they add and those that row i shares with the row before it.
    """
    before = np.concatenate([[0], np.cumsum(added)])
    cost = np.zeros(len(added) + 1)  # of the first j rows in the best way
    begin = np.zeros(len(added) + 1, dtype=np.int64)  # where the last tree of that way begins
    first = 0
    for j in range(1, len(added) + 1):
        while before[j] - before[first] + shared[first] > cap:
            first += 1
        tokens = before[j] - before[first:j] + shared[first:j]
        ways = cost[first:j] + tokens + pair_cost * tokens**2 + 1  # of equal ways the one with fewer trees
        begin[j] = first + int(ways.argmin())
        cost[j] = ways.min()
    cuts: list[int] = []
    j = len(added)
    while j:
        j = int(begin[j])
        cuts.append(j)
    return cuts[::-1]


def common_prefix(first: npt.ArrayLike, second: npt.ArrayLike) -> int:
    """How many token ids two rows share from their beginning on."""
    a, b = np.asarray(first), np.asarray(second)
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
