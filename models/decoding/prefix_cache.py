"""A KV cache that is kept between calls. A call computes only the tokens after the prefix that it shares with the last.

So if a history has grown by one event, the next call computes the tokens of this event and of the proposals after it.

Shape legend: R rows, Q query tokens, K tokens in the cache, D hidden size.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from datamodules.batching.prefix_tree import common_prefix
from models.decoding.branches import attention_mask, reading_branches
from models.decoding.growing_cache import GrowingLayer, cache_option
from models.networks.attention import MASKED_ATTENTIONS
from models.networks.self_checks import (
    MIN_LONG_LENGTH,
    SHORT_LENGTH,
    difference_problem,
    random_tokens,
    reading_problem,
    uncompiled,
)
from models.networks.tree_reading import read_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixCache:
    """The keys and values of the common prefix of the last call's rows.

    `cache_problem` tests whether a network supports it.

    Args:
        network: A causal model of transformers.
    """

    chunk = 512  # trunk tokens per forward pass, which limits the size of the mask

    def __init__(self, network: "PreTrainedModel") -> None:
        self.network = network
        self._cache = Cache(layer_class_to_replicate=GrowingLayer)
        self._cache_option = cache_option(network.base_model)
        self._cached_ids: list[int] = []  # the tokens whose keys and values the cache contains

    @torch.no_grad()
    def states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the final hidden states (R, D) at the last token of each row."""
        shared = min(min(common_prefix(rows[0], row) for row in rows), min(map(len, rows)) - 1)
        trunk, branches = list(rows[0][:shared]), [row[shared:] for row in rows]
        known = common_prefix(self._cached_ids, trunk)
        for layer in self._cache.layers:
            layer.crop(known)
        with reading_branches(self.network):
            while shared - known > self.chunk:
                self._forward(known, trunk[known : known + self.chunk], [])
                known += self.chunk
            states_QD = self._forward(known, trunk[known:], branches)
        self._cached_ids = trunk
        ends = [end - 1 for end in accumulate(map(len, branches), initial=shared - known)][1:]
        return states_QD[ends]

    def _forward(self, known: int, trunk: Sequence[int], branches: Sequence[Sequence[int]]) -> Tensor:
        """Run more tokens of the trunk, then branches that start at its end; return the final hidden states (Q, D)."""
        network, device = self.network, self.network.get_input_embeddings().weight.device
        shared, lengths = known + len(trunk), list(map(len, branches))
        token_Q = [*trunk, *(token for branch in branches for token in branch)]
        position_Q = [*range(known, shared), *(shared + offset for length in lengths for offset in range(length))]
        visible_QK = torch.ones(len(token_Q), known + len(token_Q), dtype=torch.bool, device=device).tril(known)
        if branches:
            own_branch = torch.block_diag(*(torch.ones(length, length, device=device) for length in lengths)).bool()
            visible_QK[len(trunk) :, shared:] &= own_branch
        with uncompiled(network):
            output = network.base_model(
                input_ids=torch.tensor([token_Q], device=device),
                position_ids=torch.tensor([position_Q], device=device),
                attention_mask=attention_mask(network, visible_QK[None]),
                use_cache=True,
                **{self._cache_option: self._cache},
            )
        return output.last_hidden_state[0]


def cache_problem(network: "PreTrainedModel", longest: int) -> str | None:
    """Why a network's hidden states with a kept cache differ from those of whole rows; None if they agree.

    Self-checks compare both, first on a few tokens, then on rows of `longest` tokens; see `reading_problem`.
    """
    with reading_branches(network):
        return reading_problem(
            network,
            "a cache",
            MASKED_ATTENTIONS,
            ("rows", longest),
            lambda: _state_problem(network, MIN_LONG_LENGTH),
            lambda: _state_problem(network, max(longest, MIN_LONG_LENGTH)),
        )


def _state_problem(network: "PreTrainedModel", longest: int) -> str | None:
    """Compare the states of calls that share all, half or none of their tokens with the call before.

    Returns:
        The problem; None if the states agree.
    """
    first, other = random_tokens(network, longest), random_tokens(network, longest, seed=1)
    half, few = first[: longest // 2], SHORT_LENGTH // 2
    calls: list[list[list[int]]] = [
        [half],
        [first],
        [[*half, *other[:few]], [*half, *other[few : 2 * few]]],
        [other],
        [[*first[:-1], other[0]], first],
    ]
    cache = PrefixCache(network)
    found: Any = torch.cat([cache.states(rows) for rows in calls])
    expected = torch.stack([read_row(network, row)[-1] for rows in calls for row in rows])
    return difference_problem(network, found, expected, "a kept cache gives other states than whole rows")
