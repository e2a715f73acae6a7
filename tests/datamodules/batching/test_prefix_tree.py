"""Prefix trees against sets of prefixes and against every way to cut."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.batching.layouts import ancestors
from datamodules.batching.prefix_tree import PrefixOrder, build_tree, split
from datamodules.errors import UserError

Rows = list[list[int]]
# Few tokens and short rows: so rows often share, equal and contain each other.
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=10)


@st.composite
def rows_and_choice(draw: st.DrawFn, largest: int = 10) -> tuple[Rows, list[int]]:
    rows = draw(ROWS)
    return rows, draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=largest))


def prefixes(rows: Rows, chosen: Sequence[int]) -> set[tuple[int, ...]]:
    """The tokens of the merged rows, each told by the way to it."""
    return {tuple(rows[row][: length + 1]) for row in chosen for length in range(len(rows[row]))}


@given(rows_and_choice())
def test_a_tree_has_each_shared_token_once(case: tuple[Rows, list[int]]) -> None:
    rows, chosen = case
    order = PrefixOrder(rows)
    tree = build_tree(order, chosen)
    assert order.tokens(chosen) == len(tree.input_ids) == len(prefixes(rows, chosen))
    assert sorted(tree.rows) == sorted(chosen)


@given(rows_and_choice())
def test_each_read_out_sees_its_row_and_nothing_else(case: tuple[Rows, list[int]]) -> None:
    rows, chosen = case
    tree = build_tree(PrefixOrder(rows), chosen)
    visible = ancestors(torch.from_numpy(tree.subtree_end)).numpy()
    for row, place in zip(tree.rows, tree.read_out, strict=True):
        seen = np.flatnonzero(visible[place])
        assert tree.input_ids[seen].tolist() == rows[row]
        assert tree.position_ids[seen].tolist() == list(range(len(rows[row])))
        assert tree.parent[seen].tolist() == [-1, *seen[:-1].tolist()]


@given(rows_and_choice(), st.data())
def test_answer_positions_in_a_tree_are_those_of_each_row(case: tuple[Rows, list[int]], data: st.DataObject) -> None:
    rows, chosen = case
    answers = [np.array(sorted(data.draw(st.sets(st.integers(0, len(row) - 1)))), dtype=np.int64) for row in rows]
    tree = build_tree(PrefixOrder(rows), chosen, answers)
    visible = ancestors(torch.from_numpy(tree.subtree_end)).numpy()
    for branch, row in enumerate(tree.rows):
        found = tree.answer_position[tree.answer_branch == branch]
        paths = [tree.input_ids[np.flatnonzero(visible[place])].tolist() for place in found]
        assert paths == [rows[row][: place + 1] for place in answers[row]]


def singly(rows: Sequence[int]) -> npt.NDArray[np.int64]:
    """Groups of one row."""
    return np.array(rows)[:, None]


@given(rows_and_choice(), st.data(), st.sampled_from([1, 2, 3]), st.sampled_from([0.0, 0.1]))
def test_split_keeps_groups_together_and_the_budget(
    case: tuple[Rows, list[int]], data: st.DataObject, ranks: int, pair_cost: float
) -> None:
    rows, chosen = case
    pairs = np.array([[row, data.draw(st.sampled_from(chosen))] for row in chosen])
    order = PrefixOrder(rows)
    budget = data.draw(st.integers(2 * max(map(len, rows)), 40))
    parts = split(order, pairs, budget, ranks, pair_cost)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(pairs)))
    assert all(order.tokens(np.unique(pairs[part]).tolist()) <= budget for part in parts)


def test_a_group_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.token_budget: 2 rows that stay together have 9 tokens, more than 8"):
        split(PrefixOrder([[1, 2, 3, 4, 5], [1, 6, 7, 8, 9]]), [[0, 1]], token_budget=8)


@given(rows_and_choice(), st.integers(7, 30), st.sampled_from([1, 2, 4]), st.sampled_from([0.0, 0.1]))
def test_split_keeps_every_row_and_the_budget(
    case: tuple[Rows, list[int]], budget: int, ranks: int, pair_cost: float
) -> None:
    rows, chosen = case
    order = PrefixOrder(rows)
    parts = split(order, singly(chosen), budget, ranks, pair_cost)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(chosen)))
    assert all(order.tokens([chosen[index] for index in part]) <= budget for part in parts)
    one = split(order, singly(chosen), budget, 1, pair_cost)
    assert len(parts) <= -(-len(one) // ranks) * ranks


@settings(max_examples=60)
@given(rows_and_choice(largest=7), st.integers(7, 20), st.sampled_from([0.0, 0.05, 0.5]))
def test_split_cuts_at_the_cheapest_places(case: tuple[Rows, list[int]], budget: int, pair_cost: float) -> None:
    """No other way to cut the sorted rows costs less; one unit is added for each tree."""
    rows, chosen = case
    order = PrefixOrder(rows)
    ordered = order.sorted(chosen).tolist()

    def cost(parts: Sequence[Sequence[int]]) -> float:
        sizes = [len(prefixes(rows, part)) for part in parts]
        if max(sizes) > budget:
            return float("inf")
        return sum(size + pair_cost * size**2 + 1 for size in sizes)

    places = range(1, len(ordered))
    ways = (
        [ordered[a:b] for a, b in itertools.pairwise([0, *cuts, len(ordered)])]
        for number in range(len(ordered))
        for cuts in itertools.combinations(places, number)
    )
    found = [[chosen[index] for index in part] for part in split(order, singly(chosen), budget, 1, pair_cost)]
    assert cost(found) == pytest.approx(min(map(cost, ways)))


def test_split_balances_the_trees_of_ranks() -> None:
    rows = [[1, number, *range(10)] for number in range(12)]
    order = PrefixOrder(rows)
    sizes = [len(part) for part in split(order, singly(range(12)), token_budget=100, ranks=4)]
    assert sizes == [3, 3, 3, 3]  # one rank alone would compute trees of 9 and 3 rows


def test_a_row_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.token_budget: a row has 9 tokens, more than 8"):
        split(PrefixOrder([[1] * 9, [1]]), singly([0, 1]), token_budget=8)
