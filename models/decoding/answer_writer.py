"""Chooses the tokens of answers from logits: greedy or sampled, constrained by a grammar.

Shape legend: N answers, V vocabulary size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models.decoding.grammar import AnswerGrammar
from models.decoding.trunks import Trunk
from models.networks.devices import as_float64

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer to a trace's first `step` events.

    `token_ids` exclude the end token. `finished` is False if the answer reached `max_new_tokens`. With a grammar, such
    an answer ends with tokens that the network did not generate; they complete its JSON.
    """

    trace: int
    step: int
    candidate: int
    token_ids: list[int]
    finished: bool


@dataclass
class UnfinishedAnswer:
    """An answer that is being generated.

    Attributes:
        draws: Uniform random numbers in [0, 1), one for each token.
        matcher: Tracks which tokens the grammar allows next; None without a grammar.
        token_ids: The tokens so far, without the end token.
        finished: Whether the network ended it.
        done: Whether it is finished, or has `max_new_tokens` tokens.
    """

    trace: int
    step: int
    candidate: int
    draws: "np.ndarray[Any, Any]"
    matcher: "LLMatcher | None"
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    done: bool = False


@dataclass(frozen=True)
class AnswerWriter:
    """Chooses the tokens of answers from logits. See `models.decoding.generation.generate_answers` for the fields."""

    end_id: int
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    grammar: AnswerGrammar | None = None

    def start(self, trunk: Trunk, step: int, candidate: int) -> UnfinishedAnswer:
        """Return an empty answer, with its random numbers."""
        # In float32 they are at most 1 - 2**-24, so their product with a sum in float64 stays below the sum.
        random = np.random.default_rng([self.seed, trunk.stream, step, candidate])
        draws = random.random(self.max_new_tokens, np.float32)
        return UnfinishedAnswer(trunk.trace, step, candidate, draws, self.grammar.start() if self.grammar else None)

    def extend(self, answers: Sequence[UnfinishedAnswer], logits_NV: Tensor) -> list[int]:
        """Choose the next token of each answer, append it or finish the answer, and return the tokens."""
        tokens = self._choose(answers, logits_NV.float()).tolist()
        for answer, token in zip(answers, tokens, strict=True):
            answer.finished = token == self.end_id
            if not answer.finished:
                answer.token_ids.append(token)
                if self.grammar and answer.matcher:
                    answer.finished = self.grammar.advance(answer.matcher, token)
            answer.done = answer.finished or len(answer.token_ids) == self.max_new_tokens
        return tokens

    def _choose(self, answers: Sequence[UnfinishedAnswer], logits_NV: Tensor) -> Tensor:
        """Return the next tokens (N,): the most probable ones, or samples by the inverse of the cumulative sum."""
        if self.grammar:
            matchers = [a.matcher for a in answers if a.matcher]
            allowed_NV = self.grammar.allowed(matchers, logits_NV.shape[1], logits_NV.device)
            logits_NV = logits_NV.masked_fill_(~allowed_NV, -torch.inf)
        if not self.temperature:
            return logits_NV.argmax(-1)
        cumulative_NV = (as_float64(logits_NV) / self.temperature).softmax(-1).cumsum(-1)
        draws = torch.tensor([a.draws[len(a.token_ids)] for a in answers], dtype=torch.float64)
        draw_N1 = draws[:, None].to(cumulative_NV.device) * cumulative_NV[:, -1:]
        return torch.searchsorted(cumulative_NV, draw_N1, right=True)[:, 0]

    def result(self, answer: UnfinishedAnswer) -> GeneratedAnswer:
        """Return the generated answer. The grammar completes the JSON of an answer that was cut off."""
        token_ids = answer.token_ids
        if self.grammar and not answer.finished:
            token_ids = self.grammar.close(token_ids)
        return GeneratedAnswer(answer.trace, answer.step, answer.candidate, token_ids, answer.finished)
