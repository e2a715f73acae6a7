"""Steps and micro-batches: which rows meet, on which rank, and that weights make a step the mean of its rows."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.batching.layouts import Layout, RowsLayout, TreeLayout
from datamodules.batching.steps import (
    EncodedRows,
    EvaluationSampler,
    MicroBatch,
    Step,
    StepSampler,
    micro_batches_of_rank,
)
from datamodules.errors import UserError
from tests.datamodules.conftest import few_examples

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)
RANKS = st.sampled_from([1, 2, 4])
SIZES = st.integers(1, 5)
LAYOUTS = st.sampled_from(["tree", "rows"])
Ranks = list[Step]  # one step, as each rank has it


def columns(**values: list[int]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(column) for name, column in values.items()}


def layout_of(lengths: Sequence[int], name: Literal["tree", "rows"] = "rows", micro_batch_size: int = 2) -> Layout:
    """Rows of these lengths, that all begin alike; a tree holds a few of them."""
    ids = [[*range(1, length), 100 + row] for row, length in enumerate(lengths)]
    return TreeLayout(ids, token_budget=16) if name == "tree" else RowsLayout(ids, 0, micro_batch_size)


def steps_of(
    layout: Layout, scenes: Sequence[str], batch_size: int, world_size: int = 1, **options: Any
) -> list[Ranks]:
    """The steps of an epoch, each as the ranks share it."""
    epoch = options.pop("epoch", 0)
    by_rank = []
    for rank in range(world_size):
        options = {"seed": 1, **options}
        sampler = StepSampler(layout, scenes, batch_size, rank=rank, world_size=world_size, **options)
        sampler.set_epoch(epoch)
        by_rank.append(list(sampler))
        assert len(by_rank[-1]) == len(sampler)
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def counted_rows(step: Ranks) -> list[int]:
    """The rows that count in a step, leaving out those that only keep a rank busy."""
    return [row for rank in step for batch in rank if batch.weight for row in batch.rows]


@few_examples
@given(LENGTHS, LAYOUTS, st.integers(1, 12), RANKS, st.integers(0, 3), st.sampled_from([None, 1, 2, 3]), st.data())
def test_each_epoch_has_every_row_once_and_ranks_have_equally_many_micro_batches(
    lengths: list[int],
    name: Literal["tree", "rows"],
    size: int,
    world_size: int,
    epoch: int,
    scenes_per_step: int | None,
    data: st.DataObject,
) -> None:
    batch_size = size * (scenes_per_step or 1)
    scenes = [data.draw(st.sampled_from("abcd")) for _ in lengths]
    options = {"epoch": epoch, "scenes_per_step": scenes_per_step}
    steps = steps_of(layout_of(lengths, name), scenes, batch_size, world_size, **options)
    assert sorted(row for step in steps for row in counted_rows(step)) == list(range(len(lengths)))
    assert [len(counted_rows(step)) for step in steps[:-1]] == [batch_size] * (len(steps) - 1)
    for step in steps:
        assert len({len(rank) for rank in step}) == 1, "a rank with less to do would leave the others waiting"


@few_examples
@given(LENGTHS, LAYOUTS, st.integers(1, 12), RANKS, st.randoms(use_true_random=False))
def test_weights_add_up_to_the_mean_loss_of_a_step(
    lengths: list[int], name: Literal["tree", "rows"], batch_size: int, world_size: int, random: Any
) -> None:
    """As DDP does: each rank's sum, averaged over ranks."""
    loss = [random.uniform(-5, 5) for _ in lengths]
    for step in steps_of(layout_of(lengths, name), [""] * len(lengths), batch_size, world_size):
        by_rank = [sum(batch.weight * loss[row] for batch in rank for row in batch.rows) for rank in step]
        rows = counted_rows(step)
        assert sum(by_rank) / world_size == pytest.approx(sum(loss[row] for row in rows) / len(rows))


@few_examples
@given(LENGTHS, st.integers(0, 3), st.sampled_from([None, 2]))
def test_a_step_has_the_same_rows_for_any_number_of_ranks(
    lengths: list[int], epoch: int, scenes_per_step: int | None
) -> None:
    scenes = [str(row % 3) for row in range(len(lengths))]
    shared = [
        [sorted(counted_rows(step)) for step in steps_of(layout, scenes, 8, world_size, **options)]
        for options in [{"epoch": epoch, "scenes_per_step": scenes_per_step}]
        for world_size in (1, 2, 4)
        for layout in (layout_of(lengths, "tree"), layout_of(lengths), layout_of(lengths, micro_batch_size=8))
    ]
    assert all(other == shared[0] for other in shared)


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(**options: Any) -> list[int]:
        steps = steps_of(layout_of([1] * 30), [str(row % 5) for row in range(30)], 6, scenes_per_step=2, **options)
        return [row for step in steps for row in counted_rows(step)]

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("scenes_per_step", [1, 2, 4])
def test_a_step_has_equally_many_rows_of_each_of_its_scenes(scenes_per_step: int) -> None:
    """Ten scenes of 16 rows: nothing remains to be mixed."""
    scenes = [str(row % 10) for row in range(160)]
    for step in steps_of(layout_of([1] * 160), scenes, 16, scenes_per_step=scenes_per_step):
        parts = Counter(scenes[row] for row in counted_rows(step))
        assert sorted(parts.values()) == [16 // scenes_per_step] * scenes_per_step


def test_without_scenes_per_step_rows_come_from_all_scenes() -> None:
    scenes = [str(row % 10) for row in range(160)]
    steps = steps_of(layout_of([1] * 160), scenes, 16)
    assert min(len({scenes[row] for row in counted_rows(step)}) for step in steps) > 4


def test_rows_that_remain_of_a_scene_stay_together() -> None:
    """Scenes smaller than their part of a step: a step takes whole ones, one after the other."""
    scenes = [str(row // 4) for row in range(40)]
    steps = steps_of(layout_of([1] * 40), scenes, 8, scenes_per_step=1)
    assert {len({scenes[row] for row in counted_rows(step)}) for step in steps} == {2}


def test_micro_batches_have_rows_of_similar_length() -> None:
    lengths = [9, 1, 8, 2, 7, 3]
    ((micro_batches,),) = steps_of(layout_of(lengths), [""] * 6, 6)
    assert [sorted(lengths[row] for row in batch.rows) for batch in micro_batches] == [[1, 2], [3, 7], [8, 9]]


def test_an_idle_rank_computes_a_filler_row_with_weight_0() -> None:
    (step,) = steps_of(layout_of([5]), [""], 4, world_size=4)
    assert [rank[0].rows for rank in step] == [(0,)] * 4
    assert [rank[0].weight for rank in step] == [4.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_sampling_weights_determine_how_often_a_row_is_drawn(world_size: int) -> None:
    layout, scenes = layout_of([1] * 2000), [str(row % 7) for row in range(2000)]
    sampling_weights = [0.0, *[1.0] * 999, *[3.0] * 1000]
    steps = steps_of(layout, scenes, 8, world_size, sampling_weights=sampling_weights, scenes_per_step=2)
    drawn = Counter(row for step in steps for row in counted_rows(step))
    assert drawn.total() == 2000
    assert drawn[0] == 0
    assert sum(drawn[row] for row in range(1000)) / 2000 == pytest.approx(0.25, abs=0.03)
    assert steps_of(layout, scenes, 8, world_size, sampling_weights=sampling_weights, scenes_per_step=2) == steps
    assert (
        steps_of(layout, scenes, 8, world_size, sampling_weights=sampling_weights, scenes_per_step=2, epoch=1) != steps
    )


@pytest.mark.parametrize(("batch_size", "scenes_per_step"), [(8, 3), (2, 4), (8, 0), (8, -2)])
def test_scenes_that_do_not_divide_a_step_are_refused(batch_size: int, scenes_per_step: int) -> None:
    with pytest.raises(UserError, match=f"data.scenes_per_step: {batch_size} rows of a step") as caught:
        StepSampler(layout_of([1] * 9), ["a"] * 9, batch_size, scenes_per_step)
    assert f"from {scenes_per_step} scenes" in caught.value.what


@few_examples
@given(LENGTHS, LAYOUTS, RANKS)
def test_evaluation_reads_every_row_once(lengths: list[int], name: Literal["tree", "rows"], world_size: int) -> None:
    layout = layout_of(lengths, name)
    ranks = [list(EvaluationSampler(layout, len(lengths), rank, world_size)) for rank in range(world_size)]
    assert len({len(steps) for steps in ranks}) == 1
    assert all(len(step) == 1 for steps in ranks for step in steps), "progress is seen a micro-batch at a time"
    counted = [row for steps in ranks for (batch,) in steps if batch.weight for row in batch.rows]
    assert sorted(counted) == list(range(len(lengths)))


def test_evaluation_of_no_rows_is_empty() -> None:
    assert list(EvaluationSampler(layout_of([]), 0)) == []


def test_a_rank_gets_every_nth_micro_batch() -> None:
    parts = [[1, 2], [3], [4]]
    assert micro_batches_of_rank(parts, 0, 2, 4) == (MicroBatch((1, 2), 0.5), MicroBatch((4,), 0.5))
    assert micro_batches_of_rank(parts, 1, 2, 4) == (MicroBatch((3,), 0.5), MicroBatch((1,), 0.0))


@few_examples
@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=7), min_size=1, max_size=5), st.data())
def test_rows_are_padded_on_the_right(rows: list[list[int]], data: st.DataObject) -> None:
    labels = [len(ids) % 2 for ids in rows]
    categories = [len(ids) % 4 for ids in rows]
    chosen = tuple(data.draw(st.permutations(range(len(rows)))))
    (batch,) = EncodedRows(RowsLayout(rows, 0, 2), columns(label=labels, category=categories))[
        (MicroBatch(chosen, 0.5),)
    ]
    inputs = batch["inputs"]
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (len(rows), max(map(len, rows)))
    for place, row in enumerate(chosen):
        padding = [0] * (inputs["input_ids"].shape[1] - len(rows[row]))
        assert inputs["input_ids"][place].tolist() == rows[row] + padding
        assert inputs["attention_mask"][place].tolist() == [1] * len(rows[row]) + padding
    assert batch["row"].tolist() == list(chosen)
    assert batch["label"].tolist() == [labels[row] for row in chosen]
    assert batch["category"].tolist() == [categories[row] for row in chosen]
    assert batch["weight"].tolist() == [0.5] * len(rows)
    tensors = {name: tensor for name, tensor in {**batch, **inputs}.items() if isinstance(tensor, torch.Tensor)}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "label", "category", "row"), torch.int64),
        "weight": torch.float32,
    }


@few_examples
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=7), min_size=1, max_size=5))
def test_the_labels_of_a_tree_are_in_the_order_of_its_read_outs(rows: list[list[int]]) -> None:
    labels = [ids[-1] % 2 for ids in rows]
    chosen = tuple(range(len(rows)))
    (batch,) = EncodedRows(TreeLayout(rows, 64), columns(label=labels))[(MicroBatch(chosen, 1.0),)]
    inputs = batch["inputs"]
    last = inputs["input_ids"][0][inputs["read_out"]]
    assert last.tolist() == [rows[row][-1] for row in batch["row"]]
    assert batch["label"].tolist() == [labels[row] for row in batch["row"]]
    assert inputs["position_ids"][0][inputs["read_out"]].tolist() == [len(rows[row]) - 1 for row in batch["row"]]
