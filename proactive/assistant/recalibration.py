"""Fits a gate's calibration to the answers of its user."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.errors import UserError
from proactive.assistant.deciding import Decision, Reply
from proactive.assistant.session_log import EventEntry, ReplyEntry, read_session

if TYPE_CHECKING:
    from models.learning.calibration import Calibration

MIN_ANSWERS = 50
MIN_OF_EACH = 5  # accepted and rejected offers: without both, the best temperature is a bound of its range


@dataclass
class AnsweredOffers:
    """The answered offers of sessions with one gate.

    Attributes:
        weights: The digest of the gate's weights.
        probability: The gate's P(accepted) of each offer, calibrated.
        temperature: The temperature of this calibration.
        accepted: Whether the user accepted each offer.
        propensity: The probability with which each offer was shown.
    """

    weights: str
    probability: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    propensity: list[float] = field(default_factory=list)

    def calibration(self) -> "Calibration":
        """Fit to the answers. An offer that was shown with probability p has the weight 1 / p.

        So the shown offers below the threshold stand for all offers there, of which exploration shows only some.
        """
        import torch

        from models.learning.calibration import Calibration, calibrated

        logged, temperature, propensity = (
            torch.tensor(column, dtype=torch.float64)
            for column in (self.probability, self.temperature, self.propensity)
        )
        return Calibration.fitted(
            calibrated(logged, 1 / temperature),  # undoes the session's calibration
            torch.tensor(self.accepted).long(),
            len(self.accepted),
            1 / propensity,
            "answers of the user",
        )


def read_answers(sessions: Sequence[Path]) -> AnsweredOffers:
    """Read the answered offers of sessions. Ignored and withdrawn offers are left out.

    Raises:
        UserError: A folder contains no session, a session had no gate, their gates differ, or there are too few
            answers.
    """
    found: AnsweredOffers | None = None
    for folder in sessions:
        settings, entries = read_session(folder)
        gate = settings.get("gate")
        if gate is None:
            raise UserError(f"{folder}: this session had no gate", "Leave it out.")
        found = found or AnsweredOffers(gate["weights"])
        if gate["weights"] != found.weights:
            raise UserError(f"{folder}: this session had another gate than {sessions[0]}", "Calibrate each gate alone.")
        offered: EventEntry | None = None  # an offer ends before the next one is made
        for entry in entries:
            if isinstance(entry, EventEntry):
                offered = entry if entry.decision == Decision.SHOWN else offered
            elif isinstance(entry, ReplyEntry) and entry.reply in (Reply.ACCEPTED, Reply.REJECTED):
                _add(found, offered, entry.reply == Reply.ACCEPTED, gate["temperature"])
    assert found is not None, "the parser asks for a session"
    _refuse_too_few(found.accepted)
    return found


def _add(answers: AnsweredOffers, offered: EventEntry | None, accepted: bool, temperature: float) -> None:
    if offered is None or offered.probability is None or not offered.propensity:
        return  # the gate failed, and the offer was shown without it
    answers.probability.append(offered.probability)
    answers.temperature.append(temperature)
    answers.accepted.append(accepted)
    answers.propensity.append(offered.propensity)


def _refuse_too_few(accepted: Sequence[bool]) -> None:
    count, yes = len(accepted), sum(accepted)
    if count < MIN_ANSWERS or min(yes, count - yes) < MIN_OF_EACH:
        raise UserError(
            f"{yes} offers with a P(accepted) were accepted and {count - yes} rejected; {MIN_ANSWERS} answers are "
            f"needed, and {MIN_OF_EACH} of each kind",
            "Give more sessions.",
        )
