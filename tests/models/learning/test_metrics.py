"""Metrics, compared with published counts and plain Python, with zero denominators, and on two ranks."""

import itertools
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamodules.corpus.records import Category
from models.learning.metrics import (
    RewardMetrics,
    decision_intervals,
    group_intervals,
    reward_metrics,
)
from models.learning.published_metrics import PUBLISHED_REWARD_ROWS

Row = tuple[float, bool, int]  # P(accepted), accepted, category's number
# Centred in hundredths: no draw lies on an edge of a calibration bin, where the reading of "in" may differ.
a_row = st.tuples(st.integers(0, 99).map(lambda place: (place + 0.5) / 100), st.booleans(), st.integers(0, 3))


def published_counts() -> tuple[Tensor, Tensor]:
    """Decisions and judgments with the published 8B model's TP 56, FP 6, TN 54, FN 4."""
    decided = [1] * 56 + [1] * 6 + [0] * 54 + [0] * 4
    target = [1] * 56 + [0] * 6 + [0] * 54 + [1] * 4
    return torch.tensor(decided), torch.tensor(target)


def columns(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    probability, target, category = zip(*rows, strict=True) if rows else ((), (), ())
    return (
        torch.tensor(probability, dtype=torch.float64),
        torch.tensor(target, dtype=torch.int64),
        torch.tensor(category, dtype=torch.int64),
    )


def plain_metrics(rows: Sequence[Row], threshold: float) -> dict[str, float]:
    """The same metrics by their textbook definitions, row by row."""

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    tp = sum(p > threshold and accepted for p, accepted, _ in rows)
    fp = sum(p > threshold and not accepted for p, accepted, _ in rows)
    fn = sum(p <= threshold and accepted for p, accepted, _ in rows)
    tn = len(rows) - tp - fp - fn
    pairs = list(itertools.product([p for p, a, _ in rows if a], [p for p, a, _ in rows if not a]))
    figures = {
        "accuracy": ratio(tp + tn, len(rows)),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "auroc": ratio(sum((high > low) + 0.5 * (high == low) for high, low in pairs), len(pairs)),
        "calibration_error": 0.0,
        "acceptance_rate": ratio(tp + fp, len(rows)),
        "people_acceptance_rate": ratio(tp + fn, len(rows)),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "rows": len(rows),
    }
    for number in range(10):
        inside = [(p, accepted) for p, accepted, _ in rows if min(int(p * 10), 9) == number]
        gap = abs(sum(p for p, _ in inside) - sum(accepted for _, accepted in inside))
        figures["calibration_error"] += ratio(gap, len(rows))
    for category in Category:
        right = [(p > threshold) == accepted for p, accepted, number in rows if number == category.number]
        figures[f"agreement_{category}"] = ratio(sum(right), len(right))
        figures[f"rows_{category}"] = len(right)
    return figures


def test_the_published_counts_give_the_published_metrics() -> None:
    decided, target = published_counts()
    metrics = RewardMetrics()
    metrics.update(decided.double(), target, torch.zeros_like(target))
    figures = metrics.compute()
    published = PUBLISHED_REWARD_ROWS["published 8B reward model"]
    assert {name: round(float(figures[name]), 4) for name in published} == published
    assert published == {"f1": 0.9180, "accuracy": 0.9167, "precision": 0.9032, "recall": 0.9333}
    assert [int(figures[name]) for name in ("tp", "fp", "tn", "fn", "rows")] == [56, 6, 54, 4, 120]


def test_the_published_rows_are_the_known_ones() -> None:
    named = ("GPT-4o", "GPT-4o-mini", "Llama-3.1-8B", "Llama-3.1-70B", "published 8B reward model")
    figures = [(PUBLISHED_REWARD_ROWS[name]["f1"], PUBLISHED_REWARD_ROWS[name]["accuracy"]) for name in named]
    assert figures == [(0.6704, 0.5083), (0.6324, 0.5833), (0.5846, 0.55), (0.6748, 0.5583), (0.918, 0.9167)]


@given(st.lists(a_row, min_size=1, max_size=30), st.sampled_from([0.0, 0.31, 0.5, 0.9]))
@settings(deadline=None, max_examples=60)
def test_each_metric_equals_plain_python(rows: list[Row], threshold: float) -> None:
    figures = reward_metrics(*columns(rows), threshold)
    expected = plain_metrics(rows, threshold)
    assert figures.keys() == expected.keys()
    for name, value in figures.items():
        assert float(value) == pytest.approx(expected[name], abs=1e-6), name


@given(st.lists(a_row, min_size=1, max_size=30), st.integers(1, 7))
@settings(deadline=None, max_examples=20)
def test_metrics_do_not_depend_on_batches(rows: list[Row], size: int) -> None:
    metrics = RewardMetrics(threshold=0.4)
    metrics.update(torch.tensor([0.9]), torch.tensor([0]), torch.tensor([0]))
    metrics.reset()
    for start in range(0, len(rows), size):
        metrics.update(*columns(rows[start : start + size]))
    once = {name: float(value) for name, value in reward_metrics(*columns(rows), 0.4).items()}
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(once)


@pytest.mark.parametrize(
    ("probability", "target"),
    [([0.1, 0.2], [0, 0]), ([0.1, 0.2], [1, 1]), ([0.8, 0.9], [0, 0]), ([0.8, 0.9], [1, 1]), ([0.0, 1.0], [1, 0])],
    ids=["nothing accepted by either", "none decided", "none accepted", "all right", "all wrong"],
)
def test_a_zero_denominator_gives_zero_and_no_warning(probability: list[float], target: list[int]) -> None:
    category = torch.full((2,), Category.FALSE_ALARM.number)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = reward_metrics(torch.tensor(probability), torch.tensor(target), category, scene_N=torch.arange(2))
    rows = [(p, bool(t), Category.FALSE_ALARM.number) for p, t in zip(probability, target, strict=True)]
    for name, expected in plain_metrics(rows, 0.5).items():
        assert float(figures[name]) == pytest.approx(expected, abs=1e-6), name
    assert all(math.isfinite(value) for value in figures.values())


def test_a_probability_equal_to_the_threshold_is_rejected() -> None:
    figures = reward_metrics(torch.tensor([0.7, 0.7000001]).double(), torch.ones(2).long(), torch.zeros(2), 0.7)
    assert (int(figures["tp"]), int(figures["fn"])) == (1, 1)


def test_agreement_counts_within_each_category_alone() -> None:
    numbers = [category.number for category in Category]
    target = torch.tensor([0, 1, 1, 0] * 4)  # as the categories have it: missed need is rejected, and so on
    wrong = torch.tensor([1] * 0 + [0] * 4 + [1, 0, 0, 0] + [1, 1, 0, 0] + [1, 1, 1, 1])
    order = torch.arange(16).view(4, 4).T.flatten()  # rows of one category side by side
    target, category = target[order], torch.tensor(numbers * 4)[order]
    probability = torch.where(wrong.bool(), 1 - target, target).double()
    figures = reward_metrics(probability, target, category)
    assert [float(figures[f"agreement_{name}"]) for name in Category] == [1.0, 0.75, 0.5, 0.0]


def test_intervals_contain_the_metric_and_have_the_theoretical_width() -> None:
    decided, target = published_counts()
    figures = reward_metrics(decided.double(), target, torch.zeros_like(target), scene_N=torch.arange(120))
    for name in ("accuracy", "f1"):
        assert figures[f"{name}_low"] < figures[name] < figures[f"{name}_high"]
    accuracy = float(figures["accuracy"])
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 120)
    assert float(figures["accuracy_low"]) == pytest.approx(accuracy - half, abs=0.015)
    assert float(figures["accuracy_high"]) == pytest.approx(accuracy + half, abs=0.015)


def test_rows_of_a_scene_are_drawn_together() -> None:
    """Twelve scenes of ten equal rows have the intervals of twelve rows."""
    decided, target = published_counts()
    alike = torch.arange(120) // 10  # rows of a scene are decided alike
    figures = {
        name: {key: float(value) for key, value in decision_intervals(decided, target, scene).items()}
        for name, scene in (("rows", torch.arange(120)), ("alike", alike))
    }
    width = {name: found["accuracy_high"] - found["accuracy_low"] for name, found in figures.items()}
    assert 1.5 * width["rows"] < width["alike"]
    assert {name: found["scenes"] for name, found in figures.items()} == {"rows": 120, "alike": 12}
    as_rows = decision_intervals(decided[::10], target[::10], torch.arange(12))
    sure = decision_intervals(decided[::10].repeat(10), target[::10].repeat(10), torch.arange(12).repeat(10))
    assert as_rows == sure


def test_one_scene_has_no_interval() -> None:
    decided, target = published_counts()
    assert decision_intervals(decided, target, torch.zeros(120).long()) == {"scenes": torch.tensor(1)}


def test_intervals_depend_only_on_their_seed_and_do_not_change_the_global_generator() -> None:
    counts = torch.randint(9, (12, 4), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = group_intervals(counts, 200, seed=3)
    after_one = torch.rand(1)
    torch.manual_seed(2)
    second = group_intervals(counts, 200, seed=3)
    torch.manual_seed(1)
    assert after_one == torch.rand(1)
    assert first == second
    assert first != group_intervals(counts, 200, seed=4)


def test_rows_are_returned_by_index() -> None:
    metrics = RewardMetrics()
    metrics.update(torch.tensor([0.25, 0.75]), torch.tensor([0, 1]), torch.tensor([3, 2]), torch.tensor([7, 5]))
    rows = metrics.rows()
    assert {name: column.tolist() for name, column in rows.items()} == {
        "probability": [0.75, 0.25],
        "target": [1, 0],
        "category": [2, 3],
        "row": [5, 7],
    }


def rank(number: int, folder: Path, shares: list[list[list[Row]]]) -> None:
    """One of two processes: its metrics for each division of the rows, as JSON."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    torch.set_num_threads(1)
    results = []
    for share in shares:
        metrics = RewardMetrics()
        for row in share[number]:
            metrics.update(*columns([row]))
        if not share[number]:  # what a rank adds whose batches only fill it up
            metrics.update(*columns([]))
        gathered = metrics.rows()["probability"].tolist()
        figures = {name: float(value) for name, value in metrics.compute().items()}
        kept = sum(map(len, metrics.probability))  # after the exchange each rank has its own rows again
        results.append({"rows": sorted(gathered), "figures": figures, "kept": kept})
    (folder / f"{number}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_metrics_of_one_process(tmp_path: Path) -> None:
    """Also with unequal shares, and with a rank without rows."""
    rows: list[Row] = [((7 * n % 20) / 20 + 0.01, n % 3 == 0, n % 4) for n in range(11)]
    shares = [[rows[:6], rows[6:]], [rows[:9], rows[9:]], [rows, []]]
    torch.multiprocessing.spawn(rank, (tmp_path, shares), nprocs=2)
    expected = reward_metrics(*columns(rows))
    for number in (0, 1):
        for share, found in zip(shares, json.loads((tmp_path / f"{number}.json").read_text()), strict=True):
            assert found["rows"] == sorted(probability for probability, _, _ in rows)
            assert found["figures"] == pytest.approx({name: float(value) for name, value in expected.items()})
            assert found["kept"] == len(share[number])
