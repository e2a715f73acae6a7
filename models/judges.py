"""Judges: whatever accepts or rejects an offer. None is asked in silence about a trace that it was trained on."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning import Trainer

from datamodules.chat import ChatPrompt, read_thought, read_verdict
from datamodules.errors import UserError
from datamodules.records import AnnotatedRow
from datamodules.reward import RewardDataModule
from datamodules.splits import Split
from datamodules.traces import Offer, Trace, is_known
from models.endpoint import AnswerLog, Counter, Endpoint, Session
from models.reward import RewardClassifier

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
                if (accepted := read_verdict(text)) is not None:
                    return Verdict(accepted, thought=read_thought(text))
            return Verdict(None)

        return verdict


@dataclass(frozen=True)
class RewardWeights:
    """A trained reward classifier, what its data module kept, and where it was loaded from."""

    classifier: RewardClassifier
    state: dict[str, Any]
    source: str
    digest: str

    @classmethod
    def of(cls, classifier: RewardClassifier, state: dict[str, Any], source: str) -> "RewardWeights":
        assert classifier.network is not None, "a loaded classifier has weights"
        digest = hashlib.sha256()
        for name, weight in sorted(classifier.network.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return cls(classifier, state, source, digest.hexdigest())

    def knows(self, trace: Trace, namesake: Trace | None) -> bool:
        """Whether its training rows hold the trace's session."""
        scenes = self.state.get("training_scenes")
        return is_known(trace, namesake, None if scenes is None else set(scenes), set(self.state["training_histories"]))


class RewardJudge:
    """Trained reward classifiers: P(accepted), calibrated, above each one's own threshold.

    Each trace has one of them, see `assign`. Its offers are rows such as those of training, computed as prefix trees.

    Args:
        assigned: The weights of each trace, by its name.
        traces: The events that offers refer to, by trace name.
        label: What it does, for the progress shown.
    """

    def __init__(
        self, assigned: Mapping[str, RewardWeights], traces: Mapping[str, Trace], label: str = "judging"
    ) -> None:
        self.assigned = assigned
        self.traces = traces
        self.label = label
        self.truncated = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"judge": "reward classifier", "weights": {name: one.digest for name, one in self.assigned.items()}}

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
                        accepted = probability > weights.classifier.threshold
                        verdicts[offer] = Verdict(accepted, probability)
                        advance()
        return verdicts

    def _row(self, offer: Offer) -> AnnotatedRow:
        """The offer as a row; what people said of it is not known, and is not read."""
        return AnnotatedRow.model_construct(
            history=self.traces[offer.trace].history(offer.step),
            proposal=offer.proposal,
            accepted=False,
            help_needed=None,
            annotation=(),
            stated_category=None,
        )


def score(weights: RewardWeights, rows: Sequence[AnnotatedRow]) -> tuple[list[float], int]:
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
        trainer.test(weights.classifier, data, verbose=False)
    return weights.classifier.test_rows["calibrated"].tolist(), data.truncated.get("test", 0)


def assign(
    candidates: Sequence[RewardWeights],
    traces: Sequence[Trace],
    namesakes: Mapping[str, Trace],
    option: str,
    contaminated: bool = False,
    but_not: Mapping[str, str] | None = None,
) -> tuple[dict[str, RewardWeights], list[str]]:
    """Weights for each trace: the first that were not trained on it.

    Args:
        candidates: In order of preference; several are the folds of a cross-validation.
        traces: What is to be judged.
        namesakes: The data root's own traces by name.
        option: Where the candidates come from, for messages.
        contaminated: Whether to take the first ones where all were trained on a trace.
        but_not: By trace name, the digest of weights that are not to be taken.

    Returns:
        The weights by trace name, and the names of the traces that they were trained on.

    Raises:
        UserError: All were trained on a trace, or none are left.
    """
    assigned: dict[str, RewardWeights] = {}
    known: list[str] = []
    for trace in traces:
        left = [one for one in candidates if not but_not or one.digest != but_not[trace.name]]
        if not left:
            raise UserError(
                f"{option}: the weights that hold offers back in {trace.name} are those that judge them",
                "Give other weights, or --gate-is-judge to measure it so and have it stamped on the result.",
            )
        clean = [one for one in left if not one.knows(trace, namesakes.get(trace.name))]
        if not clean:
            known.append(trace.name)
        assigned[trace.name] = (clean or left)[0]
    if known and not contaminated:
        raise UserError(
            f"{option}: trained on {len(known)} of the {len(traces)} traces that it is to judge: {', '.join(known)}",
            "Give checkpoints of folds that leave them out, or --contaminated to have it stamped on the result.",
        )
    return assigned, known
