"""Metrics over the rows of several models, and their paired differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc, binary_f1_score

from models.learning.metrics import reward_metrics
from models.learning.pooling import (
    DecidedRows,
    Estimate,
    Tally,
    joined,
    metric_differences,
    outcomes,
    pooled_metrics,
)


def decided(score: list[float], positive: list[int], groups: list[int], first: int = 0) -> DecidedRows:
    score_N, positive_N = torch.tensor(score, dtype=torch.float64), torch.tensor(positive).bool()
    names = tuple(f"row {first + index}" for index in range(len(score)))
    outcome_N = outcomes(score_N > 0.5, positive_N)
    scenes = tuple(f"scene {group}" for group in groups)
    return DecidedRows(names, scenes, outcome_N, score_N, positive_N, torch.zeros_like(outcome_N))


def random_rows(seed: int, count: int = 60, scenes: int = 6, first: int = 0) -> DecidedRows:
    torch.manual_seed(seed)
    positive = torch.rand(count) > 0.6
    score = (torch.rand(count) + 0.3 * positive).clamp(max=1).round(decimals=1)  # with equal scores
    return decided(score.tolist(), positive.int().tolist(), torch.randint(scenes, (count,)).tolist(), first)


def test_a_single_test_has_the_metrics_and_intervals_of_its_report() -> None:
    rows = random_rows(0)
    assert rows.score is not None
    numbers = {name: number for number, name in enumerate(sorted(set(rows.groups)))}
    scene_N = torch.tensor([numbers[group] for group in rows.groups])
    target_N = rows.positive.long()
    report = reward_metrics(rows.score, target_N, torch.zeros_like(target_N), scene_N=scene_N)
    found = pooled_metrics([rows])
    for name in ("accuracy", "precision", "recall", "f1", "auroc"):
        assert found[name].value == pytest.approx(float(report[name]), abs=1e-6)
    for name in ("accuracy", "f1"):
        assert found[name].low == pytest.approx(float(report[f"{name}_low"]))
        assert found[name].high == pytest.approx(float(report[f"{name}_high"]))


@given(st.integers(0, 2**31))
def test_a_drawn_group_counts_as_often_as_its_rows_would(seed: int) -> None:
    rows = random_rows(seed, count=24, scenes=4)
    assert rows.score is not None
    groups = sorted(set(rows.groups))
    drawn = torch.randint(4, (len(groups),))
    found = Tally(rows, groups).metrics(drawn.double()[None])
    repeat_N = torch.tensor([int(drawn[groups.index(group)]) for group in rows.groups])
    score_M, positive_M = rows.score.repeat_interleave(repeat_N), rows.positive.long().repeat_interleave(repeat_N)
    if len(score_M):
        assert float(found["f1"]) == pytest.approx(float(binary_f1_score((score_M > 0.5).long(), positive_M)), abs=1e-6)
    if 0 < positive_M.sum() < len(positive_M):
        assert float(found["auroc"]) == pytest.approx(float(binary_auroc(score_M, positive_M)), abs=1e-6)


def test_auroc_over_folds_compares_no_scores_of_two_models() -> None:
    """Each fold orders its own rows without a mistake, on scales that do not fit each other."""
    one = decided([0.1, 0.2], [0, 1], [0, 1])
    other = decided([0.8, 0.9], [0, 1], [2, 3], first=2)
    assert pooled_metrics([joined([one, other])])["auroc"].value == 1.0
    assert pooled_metrics([decided([0.1, 0.2, 0.8, 0.9], [0, 1, 0, 1], [0, 1, 2, 3])])["auroc"].value == 0.75


def test_equal_decisions_differ_by_nothing_and_better_ones_by_an_interval_above_zero() -> None:
    rows = random_rows(1, count=200, scenes=20)
    assert set(metric_differences([rows], [rows]).values()) == {Estimate(0.0, 0.0, 0.0)}
    right = decided(
        rows.positive.double().tolist(), rows.positive.int().tolist(), [int(group.split()[1]) for group in rows.groups]
    )
    better = metric_differences([right], [rows])["accuracy"]
    assert better.value == pytest.approx(1 - pooled_metrics([rows])["accuracy"].value)
    assert better.low is not None
    assert better.low > 0


def test_pairs_make_an_interval_narrower_than_unpaired_tests_would() -> None:
    """Two models that differ in a few rows of each scene: what the scenes have in common cancels out."""
    rows = random_rows(2, count=300, scenes=15)
    assert rows.score is not None
    changed = rows.score.clone()
    changed[::30] = 1 - changed[::30]
    groups = [int(group.split()[1]) for group in rows.groups]
    other = decided(changed.tolist(), rows.positive.int().tolist(), groups)
    difference, alone = metric_differences([rows], [other])["accuracy"], pooled_metrics([rows])["accuracy"]
    assert difference.high is not None
    assert difference.low is not None
    assert alone.high is not None
    assert alone.low is not None
    assert difference.high - difference.low < (alone.high - alone.low) / 2


def test_several_seeds_give_the_mean_of_their_metrics() -> None:
    one, other = random_rows(3), random_rows(4)
    values = [pooled_metrics([rows])["f1"].value for rows in (one, other)]
    assert pooled_metrics([one, other])["f1"].value == pytest.approx(sum(values) / 2)


def test_a_single_group_has_no_interval() -> None:
    assert pooled_metrics([decided([0.1, 0.9], [0, 1], [0, 0])])["accuracy"] == Estimate(1.0, None, None)


def test_some_rows_are_kept_by_name() -> None:
    rows = random_rows(5)
    kept = rows.only(frozenset(rows.names[:7]))
    assert kept.names == rows.names[:7]
    assert kept.outcome.tolist() == rows.outcome[:7].tolist()
