"""The gate of a live session: it decides whether an offer is worth its cost, and whether it is shown anyway."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from datamodules.corpus.records import Event
from datamodules.corpus.traces import Pair
from datamodules.escaping import error_text
from proactive.assistant.deciding import Decision
from proactive.assistant.model_thread import ModelThread

if TYPE_CHECKING:
    from models.judging.judges import RewardJudge


@dataclass(frozen=True)
class GateOptions:
    """What a gate does besides comparing a probability with its threshold.

    Args:
        shadow: Whether its verdicts are only logged, and hold nothing back.
        fails_open: Whether an offer is shown if the gate fails.
        epsilon: Probability of showing an offer that is below the threshold (exploration).
        seed: Seed of the exploration.
    """

    shadow: bool = False
    fails_open: bool = False
    epsilon: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class GateVerdict:
    """The gate's verdict on an offer.

    Attributes:
        decision: Shown, held back, or gate failed.
        probability: P(accepted); None without a gate, or if it failed.
        propensity: The probability of being shown, given the agent's offer.
        error: Why the gate failed.
    """

    decision: Decision
    probability: float | None
    propensity: float
    error: str = ""


class Gate:
    """A reward classifier that stays loaded. Its KV cache grows with the history.

    Args:
        judge: The classifier.
        threshold: It holds back offers with a lower P(accepted).
        options: The other options.
        name: The name of the session. With the seed and the event's number it determines the exploration.
        thread: The thread in which the classifier computes.
    """

    def __init__(
        self, judge: "RewardJudge", threshold: float, options: GateOptions, name: str, thread: ModelThread
    ) -> None:
        self.judge = judge
        self.threshold = threshold
        self.options = options
        self.name = name
        self.thread = thread

    @property
    def window(self) -> int:
        """Number of latest events that can matter: an event has at least one token."""
        return self.judge.scorer.data.max_length

    def describe(self) -> dict[str, Any]:
        """Return everything that determines its verdicts, as JSON."""
        described = self.judge.describe()
        return {
            "weights": described.weights,
            "temperature": self.judge.weights.model.temperature,
            "threshold": self.threshold,
            "shadow": self.options.shadow,
            "fails_open": self.options.fails_open,
            "epsilon": self.options.epsilon,
            "seed": self.options.seed,
        }

    def warm_up(self) -> None:
        """Try the network, so that the first verdict takes no longer than others.

        Raises:
            UserError: The network computes something that is not a number.
        """
        self.judge.scorer.score([Pair((), "Help.")])

    async def verdict(self, history: Sequence[Event], proposal: str, number: int) -> GateVerdict:
        """Return the verdict on an offer after the event `number`."""
        options = self.options
        try:
            pairs = [Pair(tuple(history), proposal, f"event {number}")]
            found = await self.thread.run(lambda: self.judge.judge(pairs))
        except Exception as error:  # whatever it is, the gate has not judged this offer
            decision = Decision.SHOWN if options.fails_open else Decision.GATE_FAILED
            return GateVerdict(
                decision, None, float(options.fails_open), error_text(error, 300) or type(error).__name__
            )
        probability = found[0].probability
        assert probability is not None, "a reward classifier gives a probability"
        if options.shadow or probability >= self.threshold:
            return GateVerdict(Decision.SHOWN, probability, 1.0)
        explored = Random(json.dumps([options.seed, self.name, number])).random() < options.epsilon  # noqa: S311
        return GateVerdict(Decision.SHOWN if explored else Decision.HELD_BACK, probability, options.epsilon)


async def no_gate(history: Sequence[Event], proposal: str, number: int) -> GateVerdict:
    """Show everything."""
    return GateVerdict(Decision.SHOWN, None, 1.0)
