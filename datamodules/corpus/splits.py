"""Splits into training, validation and test rows, and how contaminated the test rows are."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from datamodules.corpus.records import AnnotatedRow, scene_of
from datamodules.corpus.sources import TEST_FILE, TRACES, Corpus
from datamodules.errors import UserError

SplitName = Literal["published", "by_scene"]
TestedSplit = SplitName | Literal["all"]  # of a saved model; "all": every row tests
SCENE_NUMBERS = 2**64  # a scene's name is a hash of 64 bits


@dataclass(frozen=True)
class Split:
    """Three disjoint lists of rows."""

    train: list[AnnotatedRow]
    validation: list[AnnotatedRow]
    test: list[AnnotatedRow]


@dataclass(frozen=True)
class Contamination:
    """Number of test rows whose history also occurs in the training rows, and in the validation rows.

    `validated_rows` is None if an old checkpoint does not state its validation rows.
    """

    test_rows: int
    contaminated_rows: int
    validated_rows: int | None = 0

    @property
    def fraction(self) -> float:
        return self.contaminated_rows / self.test_rows if self.test_rows else 0.0

    def __str__(self) -> str:
        return (
            f"{self.contaminated_rows} of {self.test_rows} test rows ({self.fraction:.0%}) "
            f"have a history that also occurs in the training rows; {self.validation}"
        )

    @property
    def validation(self) -> str:
        """The count for the validation rows, in words."""
        if self.validated_rows is None:
            return "how many have one of the validation rows is unknown: the checkpoint does not say"
        return f"{self.validated_rows} have one of the validation rows"


def split_published(corpus: Corpus, validation_fraction: float, seed: int = 0) -> Split:
    """Test on the root's own test file; validate on a share of its training rows, stratified by category.

    Raises:
        UserError: The root has no test file, or too few rows of a category to validate on.
    """
    from sklearn.model_selection import train_test_split

    if not corpus.test:
        raise UserError(
            f"data.split: published needs test rows, and {corpus.root} has none",
            f"Add them in {TEST_FILE}, or for a table in test.csv, or use --data.split by_scene.",
        )
    categories = [row.category.value for row in corpus.train]
    try:
        train, validation = train_test_split(
            corpus.train, test_size=validation_fraction, stratify=categories, random_state=seed
        )
    except ValueError as error:
        raise UserError(
            f"data.validation_fraction: cannot hold out {validation_fraction} of {len(corpus.train)} rows: {error}",
            "Use another fraction, or more rows of each category.",
        ) from error
    return Split(train, validation, corpus.test)


def split_outside_traces(corpus: Corpus, validation_fraction: float, seed: int = 0) -> Split:
    """Test on the scenes of the root's test traces; train and validate on whole scenes outside them.

    Args:
        corpus: Contents of a root.
        validation_fraction: Share of these scenes used for validation; at least one scene.
        seed: Seed of the choice.

    Raises:
        UserError: The root has no test traces or no rows of their scenes, or fewer than two scenes outside them.
    """
    traced = {scene_of([step.observation for step in steps]) for steps in corpus.traces.values()}
    tested = {row.scene for row in corpus.rows if row.scenes & traced}
    others = sorted({row.scene for row in corpus.rows} - tested)
    if not traced:
        raise UserError(
            f"data.split: published needs the traces of {TRACES}/, and {corpus.root} has none",
            "Add them, or use --data.split by_scene.",
        )
    if not tested:
        raise UserError(
            f"data.split: published would test nothing: none of {corpus.root}'s annotated rows begins as one of its "
            f"traces in {TRACES}/ does",
            "Use --data.split by_scene, or add annotated rows of the traces.",
        )
    if len(others) < 2:
        raise UserError(
            f"data.split: {len(others)} scenes lie outside the test traces, too few to train and to validate on",
            "Use --data.split by_scene, or add annotated rows of other scenes.",
        )
    number = min(max(round(validation_fraction * len(others)), 1), len(others) - 1)
    held_out = set(np.random.default_rng(seed).permutation(others)[:number].tolist())
    parts = (set(others) - held_out, held_out, tested)
    return Split(*([row for row in corpus.rows if row.scene in scenes] for scenes in parts))


def split_by_scene(corpus: Corpus, folds: int, fold: int, seed: int = 0) -> Split:
    """Hold out whole scenes: fold `fold` of all rows tests, the next fold validates, the others train.

    Folds have about the same share of each category.

    Raises:
        UserError: There are fewer scenes than folds, or no such fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    scenes = [row.scene for row in corpus.rows]
    if not 3 <= folds <= len(set(scenes)):
        raise UserError(
            f"data.folds: {folds} folds of {len(set(scenes))} scenes",
            "Use at least 3 folds, and at most as many as there are scenes; the field scene may name the scenes.",
        )
    if not 0 <= fold < folds:
        raise UserError(f"data.fold: there is no fold {fold} of {folds}", f"Use 0 to {folds - 1}.")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    categories = [row.category.value for row in corpus.rows]
    try:
        with warnings.catch_warnings():
            # A category with fewer rows than folds is spread as far as possible.
            warnings.filterwarnings("ignore", message="The least populated class in y has only", category=UserWarning)
            held_out = [list(test) for _, test in splitter.split(scenes, categories, scenes)]
    except ValueError as error:
        raise UserError(
            f"data.folds: cannot divide {len(scenes)} rows into {folds} folds: {error}",
            "Use fewer folds, or more rows of each category.",
        ) from error
    test_rows, validation_rows = held_out[fold], held_out[(fold + 1) % folds]
    train_rows = sorted(set(range(len(scenes))) - set(test_rows) - set(validation_rows))
    return Split(*([corpus.rows[index] for index in indices] for indices in (train_rows, validation_rows, test_rows)))


def validates(scene: str, fraction: float) -> bool:
    """Whether a scene of a file of conversations or preferences is in the validation split.

    Args:
        scene: 16 hexadecimal digits, such as those of `scene_of`. They alone decide.
        fraction: Share of all possible scenes that validate.
    """
    return int(scene, 16) < fraction * SCENE_NUMBERS


def history_digests(rows: Iterable[AnnotatedRow]) -> list[int]:
    """Return the sorted digests of the distinct histories of some rows."""
    return sorted({row.history_digest for row in rows})


def scenes_of(rows: Iterable[AnnotatedRow]) -> set[str]:
    """Return the names of the scenes of some rows; see `AnnotatedRow.scenes`."""
    return {scene for row in rows for scene in row.scenes}


def seen_rows(split: Split) -> dict[str, list[Any]]:
    """Return the sorted digests of the histories, and the sorted scenes, that a model trained and validated on."""
    return {
        "training_histories": history_digests(split.train),
        "training_scenes": sorted(scenes_of(split.train)),
        "validation_histories": history_digests(split.validation),
        "validation_scenes": sorted(scenes_of(split.validation)),
    }


def contamination(
    training_digests: Iterable[int], test: Sequence[AnnotatedRow], validation_digests: Iterable[int] | None = ()
) -> Contamination:
    """Count the test rows whose history was trained on or validated on; the second is None if unknown."""

    def count(digests: Iterable[int]) -> int:
        known = set(digests)
        return sum(row.history_digest in known for row in test)

    validated = None if validation_digests is None else count(validation_digests)
    return Contamination(len(test), count(training_digests), validated)
