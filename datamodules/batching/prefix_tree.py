"""Prefix trees: several rows in one sequence, in which tokens of a shared prefix appear once.

In a causal backbone, a token's hidden state depends only on the tokens before it. So rows are merged as long as their
token ids agree from the beginning, also inside a segment. Each shared token is computed once, and the result equals
that of single rows up to rounding. Related work: Tree Training (arXiv 2511.00413), prefix sharing for preference pairs
(arXiv 2410.20305).

No tree of nodes is built, because sorted rows are already a tree: each row adds the tokens that it does not share with
the row before it. The added tokens of all rows, one row after the other, are the tree in depth-first order.

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
    """Lexicographic order of rows of token ids, and the number of tokens that neighbours share.

    Args:
        input_ids: N rows of token ids, each with at least one.
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
        """Sort rows, which may repeat: (R,)."""
        given = np.asarray(rows, dtype=np.int64)
        return given[np.argsort(self._rank[given], kind="stable")]

    def sorted_groups(self, groups: npt.ArrayLike) -> tuple[Integers, Integers]:
        """Sort the rows of each group, and the groups by their rows: (G, K), and the index of each group, (G,)."""
        given = np.asarray(groups, dtype=np.int64)
        inside = np.take_along_axis(given, np.argsort(self._rank[given], axis=1, kind="stable"), axis=1)
        index = np.lexsort(self._rank[inside].T[::-1])
        return inside[index], index

    def shared(self, rows: Integers) -> Integers:
        """Count the tokens that each row shares with the row before it, (R,); 0 for the first row."""
        shared = np.zeros(len(rows), dtype=np.int64)
        if len(rows) > 1:
            rank = np.sort(np.stack([self._rank[rows[:-1]], self._rank[rows[1:]]], axis=1), axis=1)
            # Two rows share the minimum of what the neighbours between them share. Equal rows share all tokens.
            neighbours = np.append(self._shared, self.lengths.max())
            minimum = np.minimum.reduceat(neighbours, rank.flatten())[::2]
            shared[1:] = np.where(rank[:, 0] == rank[:, 1], self.lengths[rows[1:]], minimum)
        return shared

    def tokens(self, rows: Sequence[int]) -> int:
        """Count the tokens of the tree of some rows."""
        ordered = self.sorted(rows)
        return int(self.lengths[ordered].sum() - self.shared(ordered).sum())


@dataclass(frozen=True)
class Tree:
    """R merged rows with T tokens in depth-first order.

    Token q attends to the tokens k with k <= q < subtree_end[k]: to itself and to its ancestors.
    """

    rows: Integers  # (R,) index of each row, in the order of branches
    read_out: Integers  # (R,) position of each row's last token
    input_ids: Integers  # (T,)
    position_ids: Integers  # (T,) number of tokens before each token in its row
    parent: Integers  # (T,) position of the token before each token in its row; -1 for a first token
    subtree_end: Integers  # (T,) position after the last descendant of each token
    answer_branch: Integers  # (P,) branch, 0 to R - 1, of each of P answer tokens
    answer_position: Integers  # (P,) position of that token; a token of several answers is listed once for each


def build_tree(order: PrefixOrder, rows: Sequence[int], answers: Sequence[Integers] | None = None) -> Tree:
    """Merge rows into a tree.

    Args:
        order: The order of all rows.
        rows: Indices of the rows to merge; they may repeat.
        answers: For each row of `order`, the positions of its answer tokens in the row. None if there are no answers.

    Examples:
        >>> order = PrefixOrder([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6]])
        >>> tree = build_tree(order, [0, 1, 2])
        >>> tree.input_ids.tolist()  # 1 2 3 4 of row 0, 6 of row 2, 5 of row 1
        [1, 2, 3, 4, 6, 5]
        >>> tree.position_ids.tolist()
        [0, 1, 2, 3, 3, 2]
        >>> q, k = np.ogrid[:6, :6]
        >>> ((k <= q) & (q < tree.subtree_end)).astype(int)  # 1 where token q attends to token k
        array([[1, 0, 0, 0, 0, 0],
               [1, 1, 0, 0, 0, 0],
               [1, 1, 1, 0, 0, 0],
               [1, 1, 1, 1, 0, 0],
               [1, 1, 1, 0, 1, 0],
               [1, 1, 0, 0, 0, 1]])
    """
    ordered = order.sorted(rows)
    shared = order.shared(ordered)
    lengths = order.lengths[ordered]
    starts = np.concatenate([[0], np.cumsum(lengths - shared)])
    size = int(starts[-1])
    input_ids, position_ids = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    parent, subtree_end = np.arange(-1, size - 1), np.full(size, size, dtype=np.int64)
    answer_positions: list[Integers] = []
    # Position in the tree of each token of the current row.
    path = np.empty(int(lengths.max(initial=0)), dtype=np.int64)
    read_out = np.empty(len(ordered), dtype=np.int64)
    depth = 0
    for number, (row, common, length) in enumerate(zip(ordered, shared, lengths, strict=True)):
        start, end = starts[number], starts[number + 1]
        subtree_end[path[common:depth]] = start  # the row branches off before them
        path[common:length] = np.arange(start, end)
        input_ids[start:end] = order.input_ids[row][common:]
        position_ids[start:end] = np.arange(common, length)
        if end > start:
            parent[start] = path[common - 1] if common else -1
        if answers is not None:
            answer_positions.append(path[answers[row]])
        read_out[number] = path[length - 1]
        depth = length
    answer_branch = np.repeat(np.arange(len(answer_positions)), [len(positions) for positions in answer_positions])
    answer_position = np.concatenate([*answer_positions, np.empty(0, dtype=np.int64)])
    return Tree(ordered, read_out, input_ids, position_ids, parent, subtree_end, answer_branch, answer_position)


def split(
    order: PrefixOrder, groups: npt.ArrayLike, token_budget: int, ranks: int = 1, pair_cost: float = 0.0
) -> list[Integers]:
    """Divide groups of rows into trees within a token budget, at minimal total cost. No group is cut apart.

    Args:
        order: The order of all rows.
        groups: (G, K) indices of the K rows of each group. Groups and rows may repeat. Single rows are groups of one.
        token_budget: Maximum number of tokens of a tree; at least the tokens of the largest group.
        ranks: Number of ranks that share the trees. If there are several, the number of trees that the budget needs
            is rounded up to a multiple of `ranks`. Then the largest tree is made as small as this number allows; fewer
            trees may result.
        pair_cost: Cost of a pair of tokens in attention, relative to all other cost of one token: a tree of t tokens
            costs t + pair_cost t^2. It is above 0 if attention also computes masked pairs.

    Returns:
        The indices of the groups of each tree, 0 to G - 1.

    Raises:
        UserError: A single group exceeds the budget.
    """
    sorted_GK, index_G = order.sorted_groups(groups)
    size = sorted_GK.shape[1]
    shared = order.shared(sorted_GK.flatten())
    added = order.lengths[sorted_GK.flatten()] - shared
    # A tree counts what each row adds to the row before it. With several rows in a group this is an upper bound,
    # because a row may come again in a later group.
    added_G = added.reshape(-1, size).sum(1)
    shared_G = shared[::size]
    largest = int((added_G + shared_G).max(initial=0))
    if largest > token_budget:
        what = "a row has" if size == 1 else f"{size} rows that stay together have"
        raise UserError(
            f"data.token_budget: {what} {largest} tokens, more than {token_budget}",
            "Make token_budget at least data.max_length." if size == 1 else "Give a greater one.",
        )
    cuts = _cuts(added_G, shared_G, token_budget, pair_cost)
    if ranks > 1:
        trees = -(-len(cuts) // ranks) * ranks
        low, high = largest, token_budget
        while low < high:  # find the smallest budget that needs no more trees
            middle = (low + high) // 2
            if len(tried := _cuts(added_G, shared_G, middle, pair_cost)) <= trees:
                cuts, high = tried, middle
            else:
                low = middle + 1
    return np.split(index_G, cuts[1:])


def _cuts(added: Integers, shared: Integers, budget: int, pair_cost: float) -> list[int]:
    """Return the first row or group of each tree, at minimal total cost, with at most `budget` tokens in each tree.

    A tree of rows (or groups) i to j - 1 has the tokens that these add, and those that row i shares with the row before
    it.
    """
    before = np.concatenate([[0], np.cumsum(added)])
    cost = np.zeros(len(added) + 1)  # minimal cost of the first j rows
    begin = np.zeros(len(added) + 1, dtype=np.int64)  # first row of their last tree
    first = 0
    for j in range(1, len(added) + 1):
        while before[j] - before[first] + shared[first] > budget:
            first += 1
        tokens = before[j] - before[first:j] + shared[first:j]
        costs = cost[first:j] + tokens + pair_cost * tokens**2 + 1  # 1 per tree: at equal cost, prefer fewer trees
        begin[j] = first + int(costs.argmin())
        cost[j] = costs.min()
    cuts: list[int] = []
    j = len(added)
    while j:
        j = int(begin[j])
        cuts.append(j)
    return cuts[::-1]


def common_prefix(first: npt.ArrayLike, second: npt.ArrayLike) -> int:
    """Count the token ids that two rows share from the beginning."""
    a, b = np.asarray(first), np.asarray(second)
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
