"""Trained models in notebooks and programs: `proactive.load_judge` and `proactive.load_agent`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

from datamodules.corpus.answers import Answer
from datamodules.corpus.columns import event_fields
from datamodules.corpus.json_records import validate
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Pair
from datamodules.errors import UserError
from models.judging.answer_options import AnswerOptions
from models.judging.local_agent import LocalAgent
from models.judging.scorer import Scorer
from models.judging.weights import Weights, load_weights
from models.learning.reward_classifier import RewardClassifier
from models.online.agent_classes import AGENTS

EventLike = str | Mapping[str, str] | Sequence[object] | Event
EVENTS_HINT = "Give each event as text, as {'time': ..., 'event': ...}, or as a pair of time and text."


class LoadedJudge:
    """A trained reward classifier on its device. `load_judge` returns it."""

    def __init__(self, weights: Weights[RewardClassifier]) -> None:
        self._scorer = Scorer(weights)

    @overload
    def score(self, events: Iterable[EventLike], proposal: str | None) -> float: ...

    @overload
    def score(self, events: Iterable[EventLike], proposal: list[str | None]) -> list[float]: ...

    def score(self, events: Iterable[EventLike], proposal: str | list[str | None] | None) -> float | list[float]:
        """The probability that the user accepts a proposal after some events.

        A call computes only the tokens after the longest common prefix with the call before.

        Args:
            events: The user's events, oldest first: texts, mappings with time and event, or pairs of time and event.
                Texts get times one second apart.
            proposal: An offer, or None for silence; or a list of them, which costs little more than one.

        Returns:
            P(accepted), 0 to 1, with the checkpoint's calibration; a list for a list of proposals.

        Raises:
            UserError: An event has another form, or the proposal is longer than the model's maximum.
        """
        history = events_of(events)
        if proposal is None or isinstance(proposal, str):
            return self._scorer.score([Pair(history, proposal)])[0]
        return self._scorer.score([Pair(history, one) for one in proposal])


class LoadedAgent:
    """A trained agent on its device. `load_agent` returns it."""

    def __init__(self, agent: LocalAgent) -> None:
        self._agent = agent
        self._stream = agent.stream("")

    def answer(self, events: Iterable[EventLike]) -> Answer | None:
        """The agent's answer after some events. `answer.proposal` is its offer, or None for silence.

        Args:
            events: As in `LoadedJudge.score`.

        Returns:
            The answer; None if it was not complete after `max_new_tokens`.

        Raises:
            UserError: An event has another form.
        """
        return self.answers(events)[0]

    def answers(self, events: Iterable[EventLike]) -> list[Answer | None]:
        """The answer of each candidate, as `answer` returns one."""
        written = self._stream.answer(self._agent.data.segments(events_of(events)))
        return [self._agent.read(answer) for answer in written]


def load_judge(path: str | Path) -> LoadedJudge:
    """Load a trained reward classifier.

    Args:
        path: A run folder (its best weights), a checkpoint, or an export folder.

    Raises:
        UserError: The path contains no reward classifier, or a damaged one.

    Examples:
        >>> judge = load_judge("runs/reward-tiny/0")
        >>> events = ["The user opens parse_rows.py.", "The user runs parse_rows.py, and it raises an error."]
        >>> probability = judge.score(events, "Explain the error.")
        >>> 0 < probability < 1
        True
        >>> len(judge.score(events, ["Explain the error.", None]))  # None is silence
        2
    """
    return LoadedJudge(load_weights((RewardClassifier,), Path(path), "load_judge"))


def load_agent(
    path: str | Path,
    *,
    candidates: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 256,
) -> LoadedAgent:
    """Load a trained agent.

    Args:
        path: A run folder (its best weights), a checkpoint, or an export folder.
        candidates: Number of answers that `answers` returns, 1 or more.
        temperature: Sampling temperature, 0 or more. 0 is greedy decoding.
        seed: Seed of sampling.
        max_new_tokens: Maximum number of tokens in an answer.

    Raises:
        UserError: The path contains no agent or a damaged one, or several candidates at temperature 0 would be equal.

    Examples:
        >>> agent = load_agent("runs/agent-tiny/0", candidates=2, temperature=0.7, max_new_tokens=64)
        >>> answers = agent.answers(["The user opens parse_rows.py."])
        >>> len(answers)
        2
        >>> offers = [answer.proposal for answer in answers if answer]  # None if an answer was cut off
    """
    weights = load_weights(AGENTS, Path(path), "load_agent")
    return LoadedAgent(LocalAgent(weights, AnswerOptions(max_new_tokens), candidates, temperature, seed))


def events_of(values: Iterable[EventLike]) -> tuple[Event, ...]:
    """Convert texts, mappings with time and event, or pairs of them to events.

    Raises:
        UserError: A value has another form. The message names its index.
    """
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"events: expected several, got one {type(values).__name__}", EVENTS_HINT)
    return tuple(_event(index, value) for index, value in enumerate(values))


def _event(index: int, value: EventLike) -> Event:
    if isinstance(value, Event):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        value = {"time": value[0], "event": value[1]}  # type: ignore[dict-item]
    try:
        return validate(event_fields(index, value), Event, f"events, index {index}")
    except UserError as error:
        raise UserError(error.what, EVENTS_HINT) from error
