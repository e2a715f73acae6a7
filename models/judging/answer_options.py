"""How a trained agent generates its answers."""

from dataclasses import asdict, dataclass
from typing import Annotated

from annotated_types import Ge, Le

from datamodules.ranges import FINITE, Count, check_ranges


@dataclass(frozen=True)
class AnswerOptions:
    """How a trained agent generates its answers.

    Args:
        max_new_tokens: Maximum number of tokens per answer. A longer answer is cut off and not used.
        constrained: Whether a grammar constrains answers to JSON.
        traces_at_once: Number of traces per batch.
    """

    max_new_tokens: Count = 256
    constrained: bool = True
    traces_at_once: Annotated[int, Ge(1), Le(4096), FINITE] = 4

    def __post_init__(self) -> None:
        check_ranges(type(self), asdict(self), "agent.answers")
