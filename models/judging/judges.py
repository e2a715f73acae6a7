"""The interface of judges, which accept or reject a proposal after a history, and its implementations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from datamodules.corpus.traces import Pair
from datamodules.errors import UserError
from datamodules.prompting.chat_prompts import VERDICT_FORMAT, ChatPrompt, read_judgment
from models.judging.chat_client import ChatClient
from models.judging.description import Advance, Description, uncounted
from models.judging.scorer import Scorer
from models.judging.weights import Weights
from models.learning.calibration import DECISION
from models.learning.reward_classifier import RewardClassifier

RETRY_TEMPERATURE = 0.5  # for retries after an unreadable verdict; at temperature 0 a model would repeat it


@dataclass(frozen=True)
class Verdict:
    """A judge's output for a proposal.

    Attributes:
        accepted: The decision; None if the judge gave no readable verdict.
        probability: P(accepted), if the judge gives it.
        thought: The judge's reason, if it gives one.
    """

    accepted: bool | None
    probability: float | None = None
    thought: str = ""


class Judge(Protocol):
    """Accepts or rejects proposals. To add a kind of judge, write a class with these methods.

    Examples:
        >>> class AcceptsShortOffers(Judge):
        ...     def describe(self):
        ...         return Description({"judge": "accepts short offers"})
        ...     async def judge(self, pairs, advance=uncounted):
        ...         return [Verdict(len(pair.proposal or "") < 40) for pair in pairs]
        >>> import asyncio
        >>> asyncio.run(AcceptsShortOffers().judge([Pair((), "Sort the files."), Pair((), "Sort the files. " * 9)]))
        [Verdict(accepted=True, probability=None, thought=''), Verdict(accepted=False, probability=None, thought='')]
    """

    def describe(self) -> Description:
        """Return its settings and its source."""
        ...

    async def judge(self, pairs: Sequence[Pair], advance: Advance = uncounted) -> list[Verdict]:
        """Return a verdict for each pair of a history and a proposal, in order; `advance` is called after each."""
        ...

    def release(self) -> None:
        """Free device memory until the next call; most judges use none."""
        return


class RecordedJudge(Judge):
    """Returns recorded judgments of one trace, and no verdict for anything else.

    Args:
        judgments: The judgments, by the number of events of a history and the proposal after it.
    """

    def __init__(self, judgments: Mapping[tuple[int, str | None], bool]) -> None:
        self.judgments = judgments

    def describe(self) -> Description:
        return Description({"judge": "recorded"})

    async def judge(self, pairs: Sequence[Pair], advance: Advance = uncounted) -> list[Verdict]:
        return [Verdict(self.judgments.get((len(pair.history), pair.proposal))) for pair in pairs]


class EndpointJudge(Judge):
    """A generative reward model behind an endpoint.

    Args:
        client: The client of the endpoint.
        prompt: The prompt.
        attempts: Maximum number of requests until a verdict can be parsed.
    """

    def __init__(self, client: ChatClient, prompt: ChatPrompt, attempts: int = 3) -> None:
        if attempts < 1:
            raise UserError(f"--judge.attempts: expected 1 or more, got {attempts}", "Give a greater one.")
        self.client = client
        self.prompt = prompt
        self.attempts = attempts

    def describe(self) -> Description:
        endpoint, prompt = self.client.endpoint, self.prompt.model_dump()
        settings = {"judge": "endpoint", **endpoint.settings, "attempts": self.attempts, "prompt": prompt}
        return Description(settings, f"judging with {endpoint.model}", source=endpoint.url)

    async def judge(self, pairs: Sequence[Pair], advance: Advance = uncounted) -> list[Verdict]:
        return await self.client.gather(self._verdict(pair, advance) for pair in pairs)

    async def _verdict(self, pair: Pair, advance: Advance) -> Verdict:
        messages = self.prompt.messages(pair.history, pair.proposal)
        where = pair.where or f"event {len(pair.history)}"
        found = Verdict(None)
        for attempt in range(self.attempts):
            temperature = max(self.client.endpoint.temperature, RETRY_TEMPERATURE) if attempt else None
            text = await self.client.ask(messages, where, attempt, temperature, VERDICT_FORMAT)
            accepted, thought = read_judgment(text or "", self.prompt.text)
            if accepted is not None:
                found = Verdict(accepted, thought=thought)
                break
        advance()
        return found


class RewardJudge(Judge):
    """A trained reward classifier: it accepts if the calibrated P(accepted) is above `DECISION`.

    Args:
        weights: The classifier.
        progress_label: The text before its progress bar.
    """

    def __init__(self, weights: Weights[RewardClassifier], progress_label: str = "judging") -> None:
        self.weights = weights
        self.progress_label = progress_label
        self.scorer = Scorer(weights)

    def describe(self) -> Description:
        calibration = self.weights.model.calibration
        return Description(
            {"judge": "reward classifier", "accepts_above": DECISION},
            self.progress_label,
            self.weights.digest,
            self.weights.source,
            {
                "calibration": None if calibration is None else asdict(calibration),
                "truncated_rows": self.scorer.truncated,
            },
        )

    async def judge(self, pairs: Sequence[Pair], advance: Advance = uncounted) -> list[Verdict]:
        verdicts = [Verdict(probability > DECISION, probability) for probability in self.scorer.score(pairs)]
        for _ in verdicts:
            advance()
        return verdicts

    def release(self) -> None:
        self.scorer.release()
