"""Tokens and cost of endpoints, as servers report them, and their limits."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datamodules.errors import UserError
from datamodules.ranges import NonNegativeFloat, check_ranges

MILLION = 1_000_000


@dataclass(frozen=True)
class Usage:
    """Tokens of requests; those whose server reports no usage are counted as unreported."""

    requests: int = 0
    unreported: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @classmethod
    def of(cls, reported: Any) -> "Usage":
        """The usage of one request, from the field `usage` of a response or a log; unreported if it does not fit."""
        names = ("prompt_tokens", "completion_tokens")
        found = [reported.get(name) for name in names] if isinstance(reported, Mapping) else [None, None]
        if all(isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0 for tokens in found):
            return cls(1, 0, *found)
        return cls(1, 1)

    @property
    def tokens(self) -> int:
        """Tokens in and out."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Price:
    """The price of a model, in any currency.

    Args:
        input: Per million prompt tokens.
        output: Per million completion tokens.
    """

    input: NonNegativeFloat = 0.0
    output: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        check_ranges(type(self), asdict(self), "price")

    def cost(self, usage: Usage) -> float:
        """The cost of some requests."""
        return (self.input * usage.prompt_tokens + self.output * usage.completion_tokens) / MILLION


class LimitReachedError(UserError):
    """A limit of tokens or cost is reached."""


class Budget:
    """The limits of tokens and cost of one endpoint, or of all endpoints of a run together.

    Args:
        token_limit: Tokens in and out; unlimited if None.
        cost_limit: Cost, in the currency of the prices; unlimited if None.
        options: The names of the options that set these limits, for messages.
        parent: A budget that includes this one, such as that of a run. Usage counts in both.
    """

    def __init__(
        self,
        token_limit: int | None = None,
        cost_limit: float | None = None,
        options: tuple[str, str] = ("endpoint.token_limit", "endpoint.cost_limit"),
        parent: "Budget | None" = None,
    ) -> None:
        self.parent = parent
        self.options = options
        self.token_limit = token_limit
        self.cost_limit = cost_limit
        self.tokens = 0
        self.cost = 0.0

    def add(self, usage: Usage, price: Price) -> None:
        """Count some requests."""
        self.tokens += usage.tokens
        self.cost += price.cost(usage)
        if self.parent is not None:
            self.parent.add(usage, price)

    def refuse_more(self) -> None:
        """Raise a LimitReachedError if a limit is reached, so that no more requests are sent."""
        for what, used, limit, option in (
            ("tokens", self.tokens, self.token_limit, self.options[0]),
            ("cost", self.cost, self.cost_limit, self.options[1]),
        ):
            if limit is not None and used >= limit:
                raise LimitReachedError(
                    f"the limit of {option} is reached: {used:,} of {limit:,} {what}",
                    f"Answers so far are kept: continue with a greater --{option}.",
                )
        if self.parent is not None:
            self.parent.refuse_more()
