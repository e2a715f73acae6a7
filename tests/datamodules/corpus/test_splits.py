"""Splits: disjoint, whole scenes, every row once, stratified; and how much of the test the training gives away."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.corpus.records import AnnotatedRow, TestStep
from datamodules.corpus.sources import Corpus, load_corpus
from datamodules.corpus.splits import (
    Split,
    contamination,
    history_digests,
    split_by_scene,
    split_outside_traces,
    split_published,
)
from datamodules.errors import UserError
from tests.datamodules.conftest import few_examples, row_of
from tests.helpers import PROACTIVEBENCH, needs_proactivebench


def parts(split: Split) -> tuple[list[AnnotatedRow], list[AnnotatedRow], list[AnnotatedRow]]:
    return split.train, split.validation, split.test


def identities(rows: Sequence[AnnotatedRow]) -> list[int]:
    """Rows by object, for two equal rows are still two."""
    return sorted(map(id, rows))


@few_examples
@given(st.data(), st.lists(st.integers(4, 9), min_size=3, max_size=9), st.integers(0, 9))
def test_by_scene_holds_whole_scenes_out_and_uses_every_row_once(
    data: st.DataObject, sizes: list[int], seed: int
) -> None:
    kinds = [("Help.", True), ("Help.", False), (None, True), (None, False)]
    rows = [
        row_of([f"scene {scene}", *map(str, range(step))], *kinds[(scene + step) % 4])
        for scene, size in enumerate(sizes)
        for step in range(size)
    ]
    corpus = Corpus("here", rows[::2], rows[1::2])
    folds = data.draw(st.integers(3, min(len(sizes), 5)))
    splits = [split_by_scene(corpus, folds, fold, seed) for fold in range(folds)]
    for split in splits:
        assert identities([*split.train, *split.validation, *split.test]) == identities(rows)
        train, validation, test = ({row.scene for row in part} for part in parts(split))
        assert train.isdisjoint(validation)
        assert train.isdisjoint(test)
        assert validation.isdisjoint(test)
        assert train
        assert validation
        assert test
    assert identities([row for split in splits for row in split.test]) == identities(rows)
    assert identities([row for split in splits for row in split.validation]) == identities(rows)


def test_by_scene_stratifies_folds_by_category(embedded: Corpus) -> None:
    whole = Counter(row.category for row in embedded.rows)
    for fold in range(5):
        test = Counter(row.category for row in split_by_scene(embedded, 5, fold).test)
        assert {category: pytest.approx(count / 5, rel=0.4) for category, count in whole.items()} == test


@pytest.mark.parametrize(
    "divide", [partial(split_by_scene, folds=5, fold=1), partial(split_published, validation_fraction=0.1)]
)
def test_split_follows_from_its_seed(embedded: Corpus, divide: Callable[..., Split]) -> None:
    assert divide(embedded, seed=1) == divide(embedded, seed=1)
    assert divide(embedded, seed=1) != divide(embedded, seed=2)


@pytest.mark.parametrize(("folds", "fold"), [(2, 0), (0, 0), (-1, 0), (10, 0), (5, 5), (5, -1)])
def test_by_scene_refuses_impossible_folds(root: Path, folds: int, fold: int) -> None:
    corpus = load_corpus(str(root))
    assert len({row.scene for row in corpus.train}) == 9
    with pytest.raises(UserError, match=r"data\.folds?: "):
        split_by_scene(Corpus("here", corpus.train, []), folds, fold)


@pytest.mark.parametrize("scenes", [3, 4])
def test_by_scene_refuses_rows_that_cannot_be_stratified(scenes: int) -> None:
    """Fewer rows of every category than folds."""
    kinds = [("Help.", True), ("Help.", False), (None, True), (None, False)]
    rows = [row_of([str(scene)], *kinds[scene]) for scene in range(scenes)]
    with pytest.raises(UserError, match=r"data\.folds: "):
        split_by_scene(Corpus("here", rows, []), 3, 0)


def test_published_tests_on_the_test_file_and_validates_within_each_category(embedded: Corpus) -> None:
    split = split_published(embedded, 0.2)
    assert split.test == embedded.test
    assert identities([*split.train, *split.validation]) == identities(embedded.train)
    whole, held_out = (Counter(row.category for row in rows) for rows in (embedded.train, split.validation))
    assert {category: pytest.approx(0.2 * count, abs=1) for category, count in whole.items()} == held_out


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5, -0.1, float("nan"), 1e-9, 1 - 1e-9])
def test_published_refuses_a_fraction_that_leaves_nothing(embedded: Corpus, fraction: float) -> None:
    with pytest.raises(UserError, match=r"data\.validation_fraction: "):
        split_published(embedded, fraction)


def test_published_refuses_a_category_of_one_row_and_a_root_without_test_file() -> None:
    rows = [*(row_of([str(number)]) for number in range(20)), row_of(["x"], None)]
    with pytest.raises(UserError, match=r"data\.validation_fraction: cannot hold out 0\.2 of 21 rows"):
        split_published(Corpus("here", rows, rows), 0.2)
    with pytest.raises(UserError, match=r"data\.split: published needs test rows, and here has"):
        split_published(Corpus("here", rows, []), 0.2)


def test_contamination_counts_test_rows_whose_history_was_trained_on() -> None:
    train = [row_of(["a"]), row_of(["a"], None), row_of(["a", "b"])]
    test = [row_of(["a"], "Other."), row_of(["a"], "Third."), row_of(["b"]), row_of(["a", "c"])]
    assert len(history_digests(train)) == 2
    found = contamination(history_digests(train), test)
    assert (found.test_rows, found.contaminated_rows, found.fraction) == (4, 2, 0.5)
    assert str(found).startswith("2 of 4 test rows (50%)")
    assert contamination([], []).fraction == 0


@pytest.fixture(scope="module")
def published() -> Corpus:
    return load_corpus(str(PROACTIVEBENCH))


@needs_proactivebench
def test_published_split_is_wholly_contaminated(published: Corpus) -> None:
    assert contamination(history_digests(published.train), published.test).contaminated_rows == 120
    trained_on = {event for row in published.train for event in row.history}
    tested = [step.observation for steps in published.traces.values() for step in steps]
    assert sum(event in trained_on for event in tested) == len(tested) == 233


@needs_proactivebench
def test_published_rows_have_the_known_scenes(published: Corpus) -> None:
    """The agent's test traces are 12 of the 16 scenes."""
    scenes: dict[str, set[int]] = {}
    for row in published.rows:
        scenes.setdefault(row.scene, set()).add(row.history_digest)
    assert len(scenes) == 16
    assert len(history_digests(published.rows)) == 313
    assert round(len(published.rows) / 313, 1) == 5.6
    tested = {step.observation for steps in published.traces.values() for step in steps}
    assert len({row.scene for row in published.rows if row.history[-1] not in tested}) == 4


@needs_proactivebench
@pytest.mark.parametrize("fold", range(5))
def test_by_scene_is_free_of_contamination_on_published_rows(published: Corpus, fold: int) -> None:
    split = split_by_scene(published, 5, fold)
    assert contamination(history_digests(split.train), split.test).contaminated_rows == 0
    assert contamination(history_digests(split.train), split.validation).contaminated_rows == 0
    for part in parts(split):
        assert len({row.category for row in part}) == 4


def test_rows_of_a_traces_scene_test_also_if_they_name_it() -> None:
    """A trace names no scene. It is recognized by its first event, and then all rows of that scene test."""
    rows = [row_of([f"scene {scene}"], scene=f"session {scene}") for scene in range(4)]
    rows.append(row_of(["later"], scene="session 0"))
    step = TestStep.model_construct(observation=rows[0].history[0], task_status=False)
    split = split_outside_traces(Corpus("here", rows, [], {"a.json": [step]}), 0.1)
    assert split.test == [rows[0], rows[4]]
    assert len(split.train) + len(split.validation) == 3


def test_a_published_split_without_rows_of_its_traces_is_refused() -> None:
    """It would test nothing, which would be found out when all is trained."""
    rows = [row_of([f"scene {scene}"], "Help.", True) for scene in range(4)]
    steps = [
        TestStep.model_construct(observation=row.history[0], task_status=False) for row in (rows[0], row_of(["other"]))
    ]
    split = split_outside_traces(Corpus("here", rows, [], {"a.json": steps[:1]}), 0.1)
    assert split.test == rows[:1]
    with pytest.raises(UserError, match="published would test nothing: none of here's annotated rows"):
        split_outside_traces(Corpus("here", rows, [], {"a.json": steps[1:]}), 0.1)
