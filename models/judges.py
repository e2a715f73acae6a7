"""Judges: whatever accepts or rejects an offer. None is asked in silence about a trace that it was trained on."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning import Trainer

from datamodules.chat import ChatPrompt, read_judgment
from datamodules.errors import UserError
from datamodules.records import AnnotatedRow
from datamodules.reward import RewardDataModule
from datamodules.splits import Split
from datamodules.traces import Offer, Trace
from models.calibration import DECISION
from models.endpoint import AnswerLog, Counter, Endpoint, Session
from models.reward import RewardClassifier
from models.weights import Weights

RETRY_TEMPERATURE = 0.5  # an unreadable verdict is asked for again with some chance in it, or it would come again


@dataclass(frozen=True)
class Verdict:
    """What a judge makes of an offer.

    `accepted` is None where the judge gave no readable verdict; `probability` is P(accepted) where it says so, and
    `thought` its reason where it gives one.
    """

    accepted: bool | None
    probability: float | None = None
    thought: str = ""


Verdicts = Mapping[Offer, Verdict]


class Judge(Protocol):
    """Accepts or rejects offers."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that its verdicts follow from, in plain types."""
        ...

    def judge(self, offers: Sequence[Offer], log: AnswerLog, count: Counter) -> Verdicts:
        """A verdict on each offer."""
        ...


class RecordedJudge:
    """Repeats the judgments that stand in the traces' files; on anything else it has no verdict."""

    settings: dict[str, Any] = {"judge": "recorded"}  # noqa: RUF012 - a Protocol's property, as a constant

    def __init__(self, judgments: Mapping[Offer, bool]) -> None:
        self.judgments = judgments

    def judge(self, offers: Sequence[Offer], log: AnswerLog, count: Counter) -> Verdicts:
        return {offer: Verdict(self.judgments.get(offer)) for offer in offers}


class EndpointJudge:
    """A generative reward model behind an endpoint.

    Args:
        endpoint: The model.
        prompt: What it is told.
        traces: The events that offers refer to, by trace name.
        attempts: How often it is asked, at most, until its verdict can be read.
    """

    def __init__(self, endpoint: Endpoint, prompt: ChatPrompt, traces: Mapping[str, Trace], attempts: int = 3) -> None:
        if attempts < 1:
            raise UserError(f"--judge.attempts: expected 1 or more, got {attempts}", "Give a greater one.")
        self.endpoint = endpoint
        self.prompt = prompt
        self.traces = traces
        self.attempts = attempts

    @property
    def settings(self) -> dict[str, Any]:
        prompt = self.prompt.model_dump()
        return {"judge": "endpoint", **self.endpoint.settings, "attempts": self.attempts, "prompt": prompt}

    def judge(self, offers: Sequence[Offer], log: AnswerLog, count: Counter) -> Verdicts:
        tasks = [self._task(offer) for offer in offers]
        verdicts = self.endpoint.run(log, tasks, f"judging with {self.endpoint.model}", count)
        return dict(zip(offers, verdicts, strict=True))

    def _task(self, offer: Offer) -> Callable[[Session], Awaitable[Verdict]]:
        messages = self.prompt.messages(self.traces[offer.trace].history(offer.step), offer.proposal)

        async def verdict(session: Session) -> Verdict:
            where = f"{offer.trace}, event {offer.step + 1}"
            for attempt in range(self.attempts):
                temperature = max(self.endpoint.temperature, RETRY_TEMPERATURE) if attempt else None
                text = await session.ask(messages, where, attempt, temperature)
                accepted, thought = read_judgment(text or "", self.prompt.text)
                if accepted is not None:
                    return Verdict(accepted, thought=thought)
            return Verdict(None)

        return verdict


class RewardJudge:
    """Trained reward classifiers: they accept where P(accepted), calibrated, is above `DECISION`.

    Each trace has one of them, see `assign`. Its offers are rows such as those of training, computed as prefix trees.

    Args:
        assigned: The weights of each trace, by its name.
        traces: The events that offers refer to, by trace name.
        label: What it does, for the progress shown.
    """

    def __init__(
        self, assigned: Mapping[str, Weights[RewardClassifier]], traces: Mapping[str, Trace], label: str = "judging"
    ) -> None:
        self.assigned = assigned
        self.traces = traces
        self.label = label
        self.truncated = 0

    @property
    def settings(self) -> dict[str, Any]:
        weights = {name: one.digest for name, one in self.assigned.items()}
        return {"judge": "reward classifier", "weights": weights, "accepts_above": DECISION}

    def judge(self, offers: Sequence[Offer], log: AnswerLog, count: Counter) -> Verdicts:
        verdicts: dict[Offer, Verdict] = {}
        used = {weights.digest: weights for weights in self.assigned.values()}
        with count(self.label, len(offers)) as advance:
            for digest, weights in used.items():
                mine = [offer for offer in offers if self.assigned[offer.trace].digest == digest]
                if mine:
                    probabilities, truncated = score(weights, [self._row(offer) for offer in mine])
                    self.truncated += truncated
                    for offer, probability in zip(mine, probabilities, strict=True):
                        verdicts[offer] = Verdict(probability > DECISION, probability)
                        advance()
        return verdicts

    def _row(self, offer: Offer) -> AnnotatedRow:
        """The offer as a row, of a history as far as it can be read; what people said of it is not known."""
        longest = self.assigned[offer.trace].state["hyperparameters"]["max_length"]  # an event has a token at least
        return AnnotatedRow.model_construct(
            history=self.traces[offer.trace].history(offer.step, longest),
            proposal=offer.proposal,
            accepted=False,
            help_needed=None,
            annotation=(),
            stated_category=None,
        )


def score(weights: Weights[RewardClassifier], rows: Sequence[AnnotatedRow]) -> tuple[list[float], int]:
    """P(accepted), calibrated, of each row, and how many rows lost their oldest events to the greatest length."""
    data = RewardDataModule.from_state(weights.state, num_workers=0, cache=False)
    data._split = Split([], [], list(rows))  # in place of its root's rows
    trainer = Trainer(
        logger=False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        devices=1,
    )
    with torch.random.fork_rng():
        trainer.test(weights.model, data, verbose=False)
    return weights.model.test_rows["calibrated"].tolist(), data.truncated.get("test", 0)
