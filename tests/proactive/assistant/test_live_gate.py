"""The gate's verdicts: threshold, shadow, exploration, and a gate that fails."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.traces import Pair
from datamodules.errors import UserError
from models.judging.judges import Verdict as Judged
from proactive.assistant.deciding import Decision
from proactive.assistant.live_gate import Gate, GateOptions
from proactive.assistant.model_thread import ModelThread
from proactive.assistant.session_log import EventEntry
from tests.proactive.assistant.sessions import decisions, event, replay


class ProposalJudge:
    """P(accepted) is what the proposal says."""

    async def judge(self, pairs: Sequence[Pair]) -> list[Judged]:
        return [Judged(float(pair.proposal or 0) > 0.5, float(pair.proposal or 0)) for pair in pairs]


def gate(threshold: float = 0.5, name: str = "a.json", **options: Any) -> Gate:
    return Gate(ProposalJudge(), threshold, GateOptions(**options), name, ModelThread())  # type: ignore[arg-type]


def verdicts(one: Gate, probability: float, count: int = 1) -> list[tuple[Decision, float]]:
    async def found() -> list[tuple[Decision, float]]:
        given = [await one.verdict([event(1)], str(probability), number) for number in range(1, count + 1)]
        return [(verdict.decision, verdict.propensity) for verdict in given]

    return asyncio.run(found())


@pytest.mark.parametrize(
    ("options", "probability", "expected"),
    [
        ({}, 0.5, (Decision.SHOWN, 1.0)),
        ({}, 0.499, (Decision.HELD_BACK, 0.0)),
        ({"shadow": True}, 0.1, (Decision.SHOWN, 1.0)),
        ({"epsilon": 1.0}, 0.1, (Decision.SHOWN, 1.0)),
        ({"epsilon": 0.2}, 0.9, (Decision.SHOWN, 1.0)),
    ],
)
def test_an_offer_is_shown_at_the_threshold(options: dict, probability: float, expected: tuple) -> None:
    assert verdicts(gate(**options), probability) == [expected]


def test_exploration_shows_that_share_and_follows_from_seed_session_and_event() -> None:
    found = verdicts(gate(epsilon=0.2), 0.1, 2000)
    assert {propensity for _, propensity in found} == {0.2}
    shown = sum(decision == Decision.SHOWN for decision, _ in found)
    assert 320 <= shown <= 480, "within 4.5 standard deviations of 400"
    assert verdicts(gate(epsilon=0.2), 0.1, 2000) == found
    for other in (gate(epsilon=0.2, seed=1), gate(epsilon=0.2, name="b.json")):
        assert verdicts(other, 0.1, 2000) != found


@pytest.mark.parametrize(("fails_open", "decision"), [(False, "gate failed"), (True, "shown")])
def test_a_gate_that_fails_says_so_and_shows_nothing_unless_told_to(
    fails_open: bool, decision: str, tmp_path: Path
) -> None:
    failing = gate(fails_open=fails_open)
    entries = replay(tmp_path, ["no number", "0.9"], ask_gate=failing.verdict, threshold=0.5)
    assert decisions(entries)[0] == decision
    first, *_ = (one for one in entries if isinstance(one, EventEntry))
    assert "could not convert string to float" in first.error
    assert (first.probability, first.propensity) == (None, float(fails_open))


def test_probability_threshold_and_propensity_are_logged(tmp_path: Path) -> None:
    entries = replay(
        tmp_path, ["0.9", None, "0.3"], {(1, "0.9"): True}, ask_gate=gate(epsilon=0.0).verdict, threshold=0.5
    )
    events = [one for one in entries if isinstance(one, EventEntry)]
    assert [(one.decision.value, one.probability, one.threshold, one.propensity) for one in events] == [
        ("shown", 0.9, 0.5, 1.0),
        ("silent", None, None, None),
        ("held back", 0.3, 0.5, 0.0),
    ]


def test_a_warm_up_that_fails_ends_before_the_session() -> None:
    class Scorer:
        def score(self, pairs: Sequence[Pair]) -> list[float]:
            raise UserError("here: a probability is NaN", "Use an earlier checkpoint.")

    one = gate()
    one.judge.scorer = Scorer()  # type: ignore[assignment]
    with pytest.raises(UserError, match="a probability is NaN"):
        one.warm_up()
