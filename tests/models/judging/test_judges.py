"""A reward classifier as judge: it reads offers as it read rows in training, and weights are known by their content."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from datamodules.corpus.traces import Pair, Trace
from datamodules.errors import UserError
from models.judging.judges import RewardJudge
from models.judging.weights import Exposure, Weights, assign
from models.learning.calibration import calibrated
from tests.models.small import fit, probabilities, small_classifier, small_data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights[Any], Any]:
    """Weights after an epoch, and the data module that they were trained with."""
    from tests.helpers import small_root

    data = small_data(small_root(tmp_path_factory.mktemp("judge") / "root"), layout="auto", token_budget=512)
    classifier = small_classifier()
    fit(classifier, data)
    return Weights(classifier, data.state_dict(), "here"), data


def test_a_pair_gets_the_token_ids_of_its_row(trained: tuple[Weights[Any], Any]) -> None:
    """All offers at once as trees, and each row by itself as in training, come to the same probability."""
    weights, data = trained
    rows = data.split.test
    judge, counted = RewardJudge(weights), []
    pairs = [Pair(row.history, row.proposal) for row in rows]
    verdicts = asyncio.run(judge.judge(pairs, lambda: counted.append(None)))
    assert len(counted) == len(rows)
    data.choose_layout(None)
    data.setup("test")
    batches = [micro_batch for step in data.test_dataloader() for micro_batch in step]
    row_R = torch.cat([batch["row"] for batch in batches])
    probability_R = torch.cat([probabilities(weights.model, batch) for batch in batches])
    expected = calibrated(probability_R, weights.model.temperature)
    for row, probability in zip(row_R.tolist(), expected.tolist(), strict=True):
        verdict = verdicts[row]
        assert verdict.probability == pytest.approx(probability, abs=1e-5)
        assert verdict.accepted is (verdict.probability > 0.5)


def test_the_state_names_the_scenes_of_the_training_rows(trained: tuple[Weights[Any], Any]) -> None:
    weights, data = trained
    assert weights.state["training_scenes"] == sorted({row.scene for row in data.split.train})
    assert weights.state["validation_scenes"] == sorted({row.scene for row in data.split.validation})
    split = data.split
    for rows, exposure in (
        (split.train, Exposure.TRAINED),
        (split.validation, Exposure.VALIDATED),
        (split.test, Exposure.NONE),
    ):
        trace = Trace("x", rows[0].history, (False,) * len(rows[0].history))
        assert weights.exposure(trace, None) is exposure
        other_cut = Trace("x", trace.events[1:] or trace.events, trace.task_status)
        assert weights.exposure(other_cut, trace) is exposure
        state = {name: value for name, value in weights.state.items() if not name.startswith("validation_")}
        old = replace(weights, state=state)
        assert old.exposure(trace, None) is (Exposure.TRAINED if exposure is Exposure.TRAINED else Exposure.UNKNOWN)


def test_weights_with_the_least_exposure_are_assigned_then_the_first_given() -> None:
    class Exposed:
        """Weights in name only."""

        def __init__(self, digest: str, **exposures: Exposure) -> None:
            self.digest, self.exposures = digest, exposures

        def exposure(self, trace: Trace, root_trace: Trace | None) -> Exposure:
            return self.exposures[trace.name]

    trained, validated, unknown, clean = Exposure.TRAINED, Exposure.VALIDATED, Exposure.UNKNOWN, Exposure.NONE
    candidates: list[Any] = [
        Exposed("first", a=validated, b=validated, c=clean, d=validated),
        Exposed("second", a=clean, b=unknown, c=clean, d=trained),
    ]
    traces = [Trace(name, (), ()) for name in ("a", "b", "c", "d")]
    assigned, exposures = assign(candidates, traces, {}, "--judge")
    judging = {name: one.digest for name, one in assigned.items()}
    assert list(judging.values()) == ["second", "second", "first", "first"]
    assert list(exposures.values()) == [clean, unknown, clean, validated]
    assigned, exposures = assign(candidates, traces[:3], {}, "--gate", but_not=judging)
    assert [one.digest for one in assigned.values()] == ["first", "first", "second"]
    assert list(exposures.values()) == [validated, validated, clean]


def test_a_trace_gets_the_first_weights_that_have_not_seen_it_and_do_not_judge_it() -> None:
    class Known:
        """Weights in name only."""

        def __init__(self, digest: str, *known: str) -> None:
            self.digest, self.known = digest, known

        def exposure(self, trace: Trace, root_trace: Trace | None) -> Exposure:
            return Exposure.TRAINED if trace.name in self.known else Exposure.NONE

    a, b, both = Known("A", "a"), Known("B", "b"), Known("C", "a", "b")
    traces = [Trace(name, (), ()) for name in ("a", "b", "c")]

    def names(candidates: list[Any], **options: Any) -> tuple[list[str], list[str]]:
        assigned, exposures = assign(candidates, traces, {}, "--judge", **options)
        return [assigned[trace.name].digest for trace in traces], [
            n for n, exposure in exposures.items() if exposure == Exposure.TRAINED
        ]

    assert names([both, a, b]) == (["B", "A", "C"], [])
    with pytest.raises(UserError, match=r"--judge: trained on 2 of the 3 traces to judge: a, b"):
        names([both])
    assert names([both], contaminated=True) == (["C", "C", "C"], ["a", "b"])
    with pytest.raises(UserError, match="also judge them"):
        names([a], contaminated=True, but_not={"a": "B", "b": "A", "c": "B"})
    assert names([a, b], contaminated=True, but_not={"a": "B", "b": "A", "c": "A"}) == (["A", "B", "B"], ["a", "b"])
