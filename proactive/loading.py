"""Trained models in a notebook or a program of one's own: `proactive.load_judge` and `proactive.load_agent`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

from datamodules.corpus.answers import Answer
from datamodules.corpus.records import Event, validate
from datamodules.corpus.traces import Pair
from datamodules.errors import UserError
from models.judging.agents import AnswerOptions, LocalAgent
from models.judging.scorer import Scorer
from models.judging.weights import Model, Weights
from models.learning.checkpoint_files import load_trained
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier

EventLike = str | Mapping[str, str] | Sequence[object] | Event
EVENTS_HINT = "Give each event as text, as {'time': ..., 'event': ...}, or as a pair of time and text."


class LoadedJudge:
    """A trained reward classifier, ready on its device; made by `load_judge`."""

    def __init__(self, weights: Weights[RewardClassifier]) -> None:
        self._scorer = Scorer(weights)

    @overload
    def score(self, events: Iterable[EventLike], proposal: str | None) -> float: ...

    @overload
    def score(self, events: Iterable[EventLike], proposal: list[str | None]) -> list[float]: ...

    def score(self, events: Iterable[EventLike], proposal: str | list[str | None] | None) -> float | list[float]:
        """How likely the user accepts a proposal after some events.

        Events that begin as those of the call before are not read again.

        Args:
            events: What the user did, oldest first: texts, mappings of time and event, or pairs of them. Texts alone
                happen a second apart.
            proposal: What is offered, or None for nothing; or several of them, which cost little more than one.

        Returns:
            P(accepted), 0 to 1, calibrated as `Calibration` of the checkpoint says; a list for several proposals.

        Raises:
            UserError: An event is none of these, or the proposal is longer than the model reads.
        """
        history = events_of(events)
        if proposal is None or isinstance(proposal, str):
            return self._scorer.score([Pair(history, proposal)])[0]
        return self._scorer.score([Pair(history, one) for one in proposal])


class LoadedAgent:
    """A trained agent, ready on its device; made by `load_agent`."""

    def __init__(self, agent: LocalAgent) -> None:
        self._agent = agent
        self._stream = agent.stream("")

    def answer(self, events: Iterable[EventLike]) -> Answer | None:
        """What the agent makes of some events; `answer.proposal` is its offer, or None for no offer.

        Args:
            events: As in `LoadedJudge.score`.

        Returns:
            The answer; None where it did not come to an end within `max_new_tokens`, so that nothing is read from it.

        Raises:
            UserError: An event is none of these.
        """
        return self.answers(events)[0]

    def answers(self, events: Iterable[EventLike]) -> list[Answer | None]:
        """The same for each candidate."""
        written = self._stream.answer(self._agent.data.segments(events_of(events)))
        return [self._agent.read(answer) for answer in written]


def load_judge(path: str | Path) -> LoadedJudge:
    """Load a trained reward classifier.

    Args:
        path: A run folder (its best weights are taken), a checkpoint, or an export folder.

    Raises:
        UserError: There is no reward classifier, or it is damaged.
    """
    return LoadedJudge(_weights(RewardClassifier, path, "load_judge"))


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
        path: A run folder (its best weights are taken), a checkpoint, or an export folder.
        candidates: How many answers `answers` gives.
        temperature: Of sampling; 0 takes the likeliest tokens.
        seed: Of sampling.
        max_new_tokens: Tokens of an answer, at most.

    Raises:
        UserError: There is no agent, it is damaged, or several candidates at temperature 0 would be the same.
    """
    weights = _weights(ProactiveAgent, path, "load_agent")
    return LoadedAgent(LocalAgent(weights, AnswerOptions(max_new_tokens), candidates, temperature, seed))


def events_of(values: Iterable[EventLike]) -> tuple[Event, ...]:
    """Events from what a person writes: texts, mappings of time and event, pairs of them, or events.

    Raises:
        UserError: One is none of these; the message names its index.
    """
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"events: expected several, got one {type(values).__name__}", EVENTS_HINT)
    return tuple(_event(index, value) for index, value in enumerate(values))


def _event(index: int, value: EventLike) -> Event:
    if isinstance(value, Event):
        return value
    if isinstance(value, str):
        value = {"time": str(index), "event": value}
    elif isinstance(value, Sequence) and len(value) == 2:
        value = {"time": value[0], "event": value[1]}  # type: ignore[dict-item]
    fields: object = value
    if isinstance(value, Mapping):
        numbers = {name: str(time) for name, time in value.items() if name == "time" and _is_number(time)}
        fields = {**value, **numbers}
    try:
        return validate(fields, Event, f"events, index {index}")
    except UserError as error:
        raise UserError(error.what, EVENTS_HINT) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weights(kind: type[Model], path: str | Path, function: str) -> Weights[Model]:
    model, state, source = load_trained(kind, Path(path), function)
    return Weights(model, state, str(source))
