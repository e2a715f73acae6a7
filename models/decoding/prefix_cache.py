"""Final states of rows that begin alike, call after call: what a call shares with the one before is not read again.

So a history that grows by an event costs that event and the proposals after it.

Shape legend: R rows, Q tokens read at once, K tokens in the cache, D hidden size.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from datamodules.batching.prefix_tree import common_prefix
from models.decoding.branches import MASKED_ATTENTIONS, GrowingLayer, attention_mask, cache_option, reading_branches
from models.networks.tree_reading import attention_window, read_row
from models.networks.trials import FEW, LEAST, difference_problem, finely_tried, random_tokens, tried, uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixCache:
    """The keys and values of what the last rows shared; see `cache_problem` for which networks it serves.

    Args:
        network: A causal model of transformers.
    """

    chunk = 512  # tokens of a trunk that are read at once, or the mask of a long one would be large

    def __init__(self, network: "PreTrainedModel") -> None:
        self.network = network
        self._cache = Cache(layer_class_to_replicate=GrowingLayer)
        self._cache_option = cache_option(network.base_model)
        self._read: list[int] = []  # the tokens whose keys and values are in the cache

    @torch.no_grad()
    def states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The final states (R, D) at the last tokens of some rows, which may be any; alike ones cost least."""
        shared = min(min(common_prefix(rows[0], row) for row in rows), min(map(len, rows)) - 1)
        trunk, branches = list(rows[0][:shared]), [row[shared:] for row in rows]
        known = common_prefix(self._read, trunk)
        for layer in self._cache.layers:
            layer.crop(known)
        with reading_branches(self.network):
            while shared - known > self.chunk:
                self._forward(known, trunk[known : known + self.chunk], [])
                known += self.chunk
            states_QD = self._forward(known, trunk[known:], branches)
        self._read = trunk
        ends = [end - 1 for end in accumulate(map(len, branches), initial=shared - known)][1:]
        return states_QD[ends]

    def _forward(self, known: int, trunk: Sequence[int], branches: Sequence[Sequence[int]]) -> Tensor:
        """Read more of the trunk, and branches that leave it at its end; the final states (Q, D)."""
        network, device = self.network, self.network.get_input_embeddings().weight.device
        shared, lengths = known + len(trunk), list(map(len, branches))
        token_Q = [*trunk, *(token for branch in branches for token in branch)]
        position_Q = [*range(known, shared), *(shared + place for length in lengths for place in range(length))]
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
    """What keeps a network from going on from a cache as it reads whole rows; None if nothing does.

    It is tried, first on a few tokens, then on rows of `longest` tokens, as for trees.
    """
    with reading_branches(network):
        attention = network.config._attn_implementation
        if attention not in MASKED_ATTENTIONS:
            return f"attention {attention} takes no mask of our own"
        window = attention_window(network.config)
        if window is not None and window < longest:
            return f"its layers see {window} tokens back, and rows have up to {longest}"
        return tried(
            network,
            "a cache",
            lambda: _misread(network, LEAST) or finely_tried(network, lambda: _misread(network, max(longest, LEAST))),
        )


def _misread(network: "PreTrainedModel", longest: int) -> str | None:
    """How states differ from those of whole rows, as rows come that share all, half or nothing with those before."""
    first, other = random_tokens(network, longest), random_tokens(network, longest, seed=1)
    half, few = first[: longest // 2], FEW // 2
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
    return difference_problem(network, found, expected, "a cache gives other states than whole rows")
