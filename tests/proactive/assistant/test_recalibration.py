"""A gate is calibrated on what its user answered: known scales come out, and exploration is weighted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.errors import UserError
from models.learning.calibration import Calibration
from proactive.assistant.deciding import Decision, Reply
from proactive.assistant.recalibration import MIN_ANSWERS, read_answers
from proactive.assistant.session_log import SESSION_FILE, EventEntry, ReplyEntry, SessionLog
from tests.proactive.assistant.sessions import event

Answered = tuple[float, float, Reply]  # P(accepted), propensity, reply


def write(folder: Path, answered: Sequence[Answered], temperature: float = 1.0, weights: str = "abc") -> Path:
    settings: dict[str, Any] = {"gate": {"weights": weights, "temperature": temperature}}
    log = SessionLog(lambda entry: None)
    log._sync_file = lambda: None  # type: ignore[method-assign] - thousands of lines
    with log.opened(folder / SESSION_FILE, settings):
        for number, (probability, propensity, reply) in enumerate(answered, 1):
            common: dict[str, Any] = {"number": number, "at": 0.0, "now": 0.0, "decided": 0.0, "cursor": {}}
            gate = {"probability": probability, "threshold": 0.5, "propensity": propensity}
            log.add(EventEntry(**common, event=event(number), decision=Decision.SHOWN, proposal="x", **gate))
            log.add(ReplyEntry(number=number, now=0.0, reply=reply))
    return folder


def logit(p: Any) -> Any:
    return np.log(p / (1 - p))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def users(count: int, scale: float, seed: int = 0) -> list[tuple[float, bool]]:
    """What a gate says that is `scale` times too sure, and what its user does."""
    random = np.random.default_rng(seed)
    log_odds = random.normal(0, 2, count)
    return list(
        zip(sigmoid(log_odds * scale).tolist(), (random.random(count) < sigmoid(log_odds)).tolist(), strict=True)
    )


@pytest.mark.parametrize("before", [1.0, 2.0])
def test_the_temperature_corrects_an_overconfident_gate(before: float, tmp_path: Path) -> None:
    """The log has calibrated probabilities; the temperature is for the network's own."""
    found = users(3000, 3.0)
    answered = [
        (float(sigmoid(logit(p) / before)), 1.0, Reply.ACCEPTED if accepted else Reply.REJECTED)
        for p, accepted in found
    ]
    calibration = read_answers([write(tmp_path / "a", answered, before)]).calibration()
    assert calibration.temperature == pytest.approx(3.0, rel=0.1)
    assert (calibration.rows, calibration.of_rows, calibration.fitted_on) == (3000, 3000, "answers of the user")


def test_exploration_is_weighted_as_if_everything_had_been_shown(tmp_path: Path) -> None:
    """The user accepts weak offers more than the gate thinks, and strong ones as it thinks."""
    random = np.random.default_rng(1)
    everything = [(p, bool(random.random() < (p if p >= 0.5 else 0.5))) for p, _ in users(8000, 1.0)]
    shown = [(p, accepted) for p, accepted in everything if p >= 0.5 or random.random() < 0.1]

    def fitted(rows: Sequence[tuple[float, bool]], name: str, weighted: bool) -> Calibration:
        answered = [
            (p, 0.1 if weighted and p < 0.5 else 1.0, Reply.ACCEPTED if accepted else Reply.REJECTED)
            for p, accepted in rows
        ]
        return read_answers([write(tmp_path / name, answered)]).calibration()

    expected = fitted(everything, "all", False).temperature
    assert fitted(shown, "weighted", True).temperature == pytest.approx(expected, rel=0.1)
    assert fitted(shown, "unweighted", False).temperature < 0.8 * expected


def test_only_answers_count_and_too_few_are_refused(tmp_path: Path) -> None:
    half = MIN_ANSWERS // 2
    enough = [(0.7, 1.0, Reply.ACCEPTED), (0.4, 1.0, Reply.REJECTED)] * half
    others = [(0.2, 1.0, Reply.IGNORED), (0.2, 1.0, Reply.WITHDRAWN)] * 99
    first, second = write(tmp_path / "a", enough[:-1]), write(tmp_path / "b", [*others, *enough[-1:]])
    with pytest.raises(UserError, match=rf"{half} offers .* accepted and {half - 1} rejected; {MIN_ANSWERS} answers"):
        read_answers([first])
    assert len(read_answers([first, second]).accepted) == MIN_ANSWERS
    assert read_answers([first, second]).calibration().rows == MIN_ANSWERS
    with pytest.raises(UserError, match="5 of each kind"):
        read_answers([write(tmp_path / "c", [(0.7, 1.0, Reply.ACCEPTED)] * 999)])


def test_sessions_of_other_gates_or_of_none_are_refused(tmp_path: Path) -> None:
    first, other = write(tmp_path / "a", []), write(tmp_path / "b", [], weights="other")
    with pytest.raises(UserError, match="b: this session had another gate than"):
        read_answers([first, other])
    with SessionLog(lambda entry: None).opened(tmp_path / "c" / SESSION_FILE, {"gate": None}):
        pass
    with pytest.raises(UserError, match="c: this session had no gate"):
        read_answers([tmp_path / "c"])
