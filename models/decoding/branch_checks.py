"""Self-checks that show whether a network can generate from a branched cache."""

import inspect
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.decoding.branches import BranchReader
from models.networks.attention import MASKED_ATTENTIONS
from models.networks.self_checks import (
    EXACT_TOLERANCE,
    MIN_LONG_LENGTH,
    SHORT_LENGTH,
    difference_problem,
    random_tokens,
    reading_problem,
    relative_difference,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BRANCHES = 16  # of the check with many branches
ANSWER_LENGTH = 2  # tokens of an answer
OTHER_LOGITS = "the logits of an answer differ from those after its prompt"
log = logging.getLogger("proactive")


def can_branch(network: "PreTrainedModel", longest: int) -> bool:
    """Whether the network can generate from a branched cache, by `branch_problem`. If not, the reason is logged."""
    problem = branch_problem(network, longest)
    if problem:
        log.info("Slow generation, one prompt at a time: %s.", problem)
    return problem is None


def branch_problem(network: "PreTrainedModel", longest: int) -> str | None:
    """Why a network cannot generate from a branched cache; None if it can.

    Self-checks compare logits, first on a few tokens, then at the length of the longest prompt; see `reading_problem`.

    Args:
        network: A causal language model of transformers.
        longest: Tokens of the longest prompt and its answer.
    """
    tokens = max(longest, MIN_LONG_LENGTH)

    def long_check() -> str | None:
        problem = _long_trunk_problem(network, tokens) or _many_branches_problem(network, tokens)
        return problem and f"{problem}, for prompts with answers of up to {tokens} tokens"

    lengths = ("prompts with answers", longest)
    return reading_problem(network, "branches", MASKED_ATTENTIONS, lengths, lambda: _short_problem(network), long_check)


def _short_problem(network: "PreTrainedModel") -> str | None:
    """Compare the logits of branches and of whole prompts on a few tokens; None if they agree."""
    tokens = random_tokens(network, 16)
    first, left, other, right = (tokens[start : start + 4] for start in range(0, 16, 4))
    trunk, generation_prompt = [*first, *left], first[:2]

    def read(event: list[int], beside: list[int]) -> Tensor:
        """The logits of a branch after `left`, with another event after it and another branch beside it."""
        reader = BranchReader(network)
        reader.begin([[*trunk, *event], trunk[:5]], [[len(trunk), len(trunk) + len(event)], [5]], generation_prompt)
        logits = []
        for mine, its in zip(right[:2], beside[:2], strict=True):
            reader.branch([[0, 1], [0]])
            logits.append(reader.read([[mine, its], [its]])[0, 0])
        return torch.stack(logits)

    found, beside_other = read(right, left), read(other, right)
    if relative_difference(found, beside_other) > EXACT_TOLERANCE:
        return "an answer depends on later events or on other answers"
    return difference_problem(
        network, found, _last_logits(network, [*trunk, *generation_prompt, *right[:2]], 2), OTHER_LOGITS
    )


def _long_trunk_problem(network: "PreTrainedModel", longest: int) -> str | None:
    """Compare branches at the start, middle and end of a trunk of the greatest length."""
    end = longest - SHORT_LENGTH - ANSWER_LENGTH
    ends = [min(SHORT_LENGTH, end), (end + 1) // 2, end]
    return _branches_problem(network, random_tokens(network, end), ends, SHORT_LENGTH)


def _many_branches_problem(network: "PreTrainedModel", longest: int) -> str | None:
    """Compare many branches of a short trunk, which together have twice the tokens of the longest prompt."""
    depth = max(2 * longest // BRANCHES, 1)
    ends = [1 + branch % SHORT_LENGTH for branch in range(BRANCHES)]
    return _branches_problem(network, random_tokens(network, SHORT_LENGTH), ends, depth)


def _branches_problem(network: "PreTrainedModel", trunk: list[int], ends: list[int], depth: int) -> str | None:
    """Compare the first, a middle and the last branch, with generation prompts of `depth` tokens."""
    tokens, reader = random_tokens(network, depth + ANSWER_LENGTH, seed=1), BranchReader(network)
    generation_prompt, answer = tokens[:depth], tokens[depth:]
    found = [reader.begin([trunk], [ends], generation_prompt)]
    for token in answer:
        reader.branch([range(len(ends))])
        found.append(reader.read([[token] * len(ends)]))
    found_SOV = torch.cat(found).transpose(0, 1)
    chosen = [0, len(ends) // 2, len(ends) - 1]
    expected = [_last_logits(network, [*trunk[: ends[branch]], *tokens], ANSWER_LENGTH + 1) for branch in chosen]
    return difference_problem(network, found_SOV[chosen].flatten(0, 1), torch.cat(expected), OTHER_LOGITS)


@torch.no_grad()
def _last_logits(network: "PreTrainedModel", prompt: list[int], kept: int) -> Tensor:
    """The last `kept` logits (kept, V) of one prompt."""
    prompt_1T = torch.tensor([prompt], device=network.get_input_embeddings().weight.device)
    options = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
    return network(input_ids=prompt_1T, attention_mask=torch.ones_like(prompt_1T), **options).logits[0, -kept:]
