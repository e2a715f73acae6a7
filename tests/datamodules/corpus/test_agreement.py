"""Agreement: alpha and kappa against published examples, against its definition, and on the published annotations."""

import itertools
from collections.abc import Hashable, Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.corpus.agreement import agreement
from datamodules.corpus.sources import load_corpus
from tests.helpers import PROACTIVEBENCH, needs_proactivebench


def nominal_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    return agreement((("", list(unit)) for unit in units), resamples=0)["alpha"]


def test_binary_labels_of_two_annotators_without_gaps() -> None:
    """Krippendorff (2011), section A: ten units, alpha 0.095."""
    first, second = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    assert nominal_alpha(zip(first, second, strict=True)) == pytest.approx(0.095, abs=5e-4)


def test_nominal_labels_of_two_annotators() -> None:
    """The same, section B: twelve units, five labels, alpha 0.692."""
    assert nominal_alpha(zip("aabbdcccedda", "babbbccceddd", strict=True)) == pytest.approx(0.692, abs=5e-4)


def test_several_annotators_with_gaps() -> None:
    """The same, section C: four annotators, twelve units with gaps, nominal alpha 0.743."""
    rows = ("1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .")
    units = zip(*(row.split() for row in rows), strict=True)
    assert nominal_alpha([label for label in unit if label != "."] for unit in units) == pytest.approx(0.743, abs=5e-4)


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=8))
@settings(deadline=None)
def test_alpha_equals_its_definition(units: list[list[int]]) -> None:
    kept = [unit for unit in units if len(unit) > 1]
    labels = [label for unit in kept for label in unit]
    pairs = list(itertools.permutations(labels, 2))
    expected = sum(a != b for a, b in pairs) / len(pairs) if pairs else 0
    found = nominal_alpha(units)
    if not expected:
        assert found is None
        return
    observed = sum(sum(a != b for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in kept) / len(labels)
    assert found == pytest.approx(1 - observed / expected)


@needs_proactivebench
def test_agreement_of_the_published_annotations() -> None:
    """The known values: of all rows, of proposals in text, and of null."""
    corpus = load_corpus(str(PROACTIVEBENCH))
    for rows, known in ((corpus.train, (0.145, 0.169, -0.214)), (corpus.test, (0.658, 1.0, 0.254))):
        kinds = (rows, [r for r in rows if r.proposal is not None], [r for r in rows if r.proposal is None])
        found = [nominal_alpha(row.annotation for row in kind) for kind in kinds]
        assert found == pytest.approx(known, abs=5e-4)


def test_kappa_of_the_example_in_fleiss_paper() -> None:
    """Fleiss (1971) in the form of the worked example of ten subjects, 14 raters and five categories: kappa 0.210."""
    counts = (
        "0 0 0 0 14, 0 2 6 4 2, 0 0 3 5 6, 0 3 9 2 0, 2 2 8 1 1, 7 7 0 0 0, 3 2 6 3 0, 2 5 3 2 2, 6 5 2 1 0, 0 2 2 3 7"
    )
    units = [
        ("", [value for value, count in enumerate(unit.split()) for _ in range(int(count))])
        for unit in counts.split(",")
    ]
    found = agreement(units)
    assert (found["kappa"], found["raw"]) == (pytest.approx(0.210, abs=5e-4), pytest.approx(0.378, abs=5e-4))


def test_kappa_needs_complete_units_and_raw_counts_pairs() -> None:
    found = agreement([("a", [1, 1, 0]), ("b", [1, 1]), ("b", [1])], resamples=0)
    assert (found["units"], found["traces"], found["kappa"]) == (2, 2, None)
    assert found["raw"] == pytest.approx((1 / 3 + 1) / 2)


def test_intervals_draw_whole_traces() -> None:
    """Two traces, one all agreement and one all dissent: a draw has shares 0, 1/2 or 1 of agreement."""
    units = [("agree", [1, 1]), ("agree", [0, 0]), ("dissent", [0, 1]), ("dissent", [1, 0])]
    found = agreement(units * 50)
    assert (found["raw"], found["raw_low"], found["raw_high"]) == (0.5, 0.0, 1.0)
    assert "raw_low" not in agreement([("one", [1, 1]), ("one", [0, 1])])
    assert agreement(units, seed=3) == agreement(units, seed=3)


def test_agreement_of_equal_labels_is_undefined() -> None:
    found = agreement([("a", [1, 1]), ("b", [1, 1])])
    assert (found["raw"], found["alpha"], found["kappa"]) == (1.0, None, None)
    assert agreement([])["raw"] is None
