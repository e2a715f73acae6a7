"""A KV cache with branches: several continuations share the keys and values of one prompt, the trunk.

Only the attention mask separates branches: a branch attends to the trunk up to its start, and to itself. An example
with a trunk of four tokens and two branches of two tokens, which start after trunk tokens 2 and 4:

                  trunk      branch tokens, in the order of the cache
    query         1 2 3 4    a1 b1 a2 b2
    a2            x x        x     x
    b2            x x x x       x     x

Shape legend: B trunks in a batch, S steps per trunk, W branches per trunk, O tokens of a generation prompt, T of a
trunk, K tokens in the cache, Q query tokens, N answers, D hidden size, V vocabulary size.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from models.decoding.growing_cache import GrowingLayer, cache_option
from models.networks.attention import GROUPED, register
from models.networks.self_checks import uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_USED = 0.5  # a cache is compacted if less than this fraction of it is still attended to


@contextlib.contextmanager
def reading_branches(network: "PreTrainedModel") -> Iterator[None]:
    """Set evaluation mode and an attention that accepts branch masks; restore both afterwards."""
    training, attention = network.training, network.config._attn_implementation
    network.eval()
    try:
        _attend_to_branches(network)
        yield
    finally:
        network.set_attn_implementation(attention)
        network.train(training)


def _attend_to_branches(network: "PreTrainedModel") -> None:
    """Select an attention that accepts any mask, and on a GPU one that does not copy keys for each head.

    FlexAttention, which training uses for trees, would compile again for each length.
    """
    if network.config._attn_implementation == "flex_attention":
        try:
            network.set_attn_implementation("sdpa")
        except ValueError:  # its attention has features that sdpa lacks
            network.set_attn_implementation("eager")
    on_gpu = network.get_input_embeddings().weight.device.type == "cuda"
    if on_gpu and network.config._attn_implementation == "sdpa":
        register()
        network.set_attn_implementation(GROUPED)


def attention_mask(network: "PreTrainedModel", visible_BQK: Tensor) -> Tensor:
    """Convert a mask, (B, Q, K) bool, True where a query attends to a key, to the form of the network: (B, 1, Q, K)."""
    mask_B1QK = visible_BQK[:, None]
    if network.config._attn_implementation != "eager":
        return mask_B1QK
    lowest = torch.finfo(network.dtype).min  # eager adds the mask to the scores
    return torch.zeros_like(mask_B1QK, dtype=network.dtype).masked_fill(~mask_B1QK, lowest)


class BranchReader:
    """Runs forward passes over branches, with one cache per trunk.

    `visible_BWK` is the mask of each branch over the cache, `position_BW` the position of its next token. Trunks with
    fewer branches than others are padded with unused branches.
    """

    def __init__(self, network: "PreTrainedModel") -> None:
        self.network = network
        self.device = network.get_input_embeddings().weight.device
        self.cache = Cache(layer_class_to_replicate=GrowingLayer)
        self.visible_BWK = torch.empty(0)
        self.position_BW = torch.empty(0)
        self._options = inspect.signature(network.forward).parameters
        self._cache_option = cache_option(network)

    def begin(
        self, trunks: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], generation_prompt: Sequence[int]
    ) -> Tensor:
        """Run trunks and the generation prompt of each branch; return the logits (B, S, V) after the prompts.

        The cache holds the trunk, then the first token of each branch, then the second token of each branch, ...

        Args:
            trunks: Token ids of each trunk.
            ends: For each trunk, the number of trunk tokens that each branch attends to.
            generation_prompt: Token ids. If empty, each branch repeats the last trunk token that it attends to.
        """
        length, width, depth = max(map(len, trunks)), max(map(len, ends)), max(len(generation_prompt), 1)
        trunk_BT, end_BS = self._padded(trunks, length), self._padded(ends, width)
        if generation_prompt:
            prompt_BSO = torch.tensor(generation_prompt, device=self.device).expand(*end_BS.shape, -1)
        else:
            end_BS = (end_BS - 1).clamp(min=0)
            prompt_BSO = trunk_BT.gather(1, end_BS)[:, :, None]
        position_BT = torch.arange(length, device=self.device).expand(len(trunks), -1)
        position_BOS = end_BS[:, None] + torch.arange(depth, device=self.device)[:, None]
        visible_BQK = _prompts_after_trunk(end_BS, length, depth)
        self.visible_BWK, self.position_BW = visible_BQK[:, -width:], end_BS + depth
        input_ids_BQ = torch.cat([trunk_BT, prompt_BSO.transpose(1, 2).flatten(1)], 1)
        return self._forward(input_ids_BQ, torch.cat([position_BT, position_BOS.flatten(1)], 1), visible_BQK, width)

    def resume(self, known: int, tokens: Sequence[int]) -> Tensor:
        """Continue a single trunk: crop the cache to its first `known` tokens, then run `tokens`.

        Returns:
            Logits (1, 1, V) after the last token, where its only branch starts.
        """
        for layer in self.cache.layers:
            layer.crop(known)
        length = known + len(tokens)
        visible_1QK = torch.ones(1, len(tokens), length, dtype=torch.bool, device=self.device).tril(known)
        position_1Q = torch.arange(known, length, device=self.device)[None]
        self.visible_BWK, self.position_BW = visible_1QK[:, -1:], position_1Q[:, -1:] + 1
        return self._forward(self._padded([tokens], len(tokens)), position_1Q, visible_1QK, 1)

    def branch(self, indices: Sequence[Sequence[int]]) -> list[int]:
        """Select branches of each trunk by index, in the given order; a repeated index forks the branch.

        Trunks without branches, and tokens that no branch attends to, are dropped if that makes the cache much smaller.

        Returns:
            The indices of the remaining trunks.
        """
        return self._branch(indices, MIN_USED)

    def _branch(self, indices: Sequence[Sequence[int]], min_used: float) -> list[int]:
        row_B1 = torch.arange(len(indices), device=self.device)[:, None]
        index_BW = self._padded(indices, max(map(len, indices)))
        self.visible_BWK, self.position_BW = self.visible_BWK[row_B1, index_BW], self.position_BW[row_B1, index_BW]
        rows = [row for row, branches in enumerate(indices) if branches]
        row_B = torch.tensor(rows, device=self.device)
        seen_BK = self.visible_BWK[row_B].any(1)
        left = int(seen_BK.sum(1).max())
        if len(rows) * left > min_used * len(indices) * seen_BK.shape[1]:
            return list(range(len(indices)))
        token_BK = seen_BK.int().argsort(dim=1, descending=True, stable=True)[:, :left]
        for layer in self.cache.layers:
            layer.keep(row_B, token_BK)
        self.position_BW = self.position_BW[row_B]
        self.visible_BWK = self.visible_BWK[row_B].gather(2, token_BK[:, None].expand(-1, index_BW.shape[1], -1))
        return rows

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Run one token per branch; return the logits (B, W, V) after it."""
        width = self.visible_BWK.shape[1]
        itself_BWW = torch.eye(width, dtype=torch.bool, device=self.device).expand(len(tokens), -1, -1)
        self.visible_BWK = torch.cat([self.visible_BWK, itself_BWW], 2)
        logits_BWV = self._forward(self._padded(tokens, width), self.position_BW, self.visible_BWK, width)
        self.position_BW = self.position_BW + 1
        return logits_BWV

    @torch.no_grad()
    def _forward(self, input_ids_BT: Tensor, position_BT: Tensor, visible_BTK: Tensor, kept: int) -> Tensor:
        """The logits (B, kept, V) of the last `kept` tokens."""
        options: dict[str, Any] = {"logits_to_keep": kept} if "logits_to_keep" in self._options else {}
        options[self._cache_option] = self.cache
        with uncompiled(self.network):
            output = self.network(
                input_ids=input_ids_BT,
                position_ids=position_BT,
                attention_mask=attention_mask(self.network, visible_BTK),
                use_cache=True,
                **options,
            )
        return output.logits[:, -kept:]

    def _padded(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)


def _prompts_after_trunk(end_BS: Tensor, length: int, depth: int) -> Tensor:
    """The attention mask of trunks followed by their generation prompts, (B, T + O S, T + O S) bool.

    Args:
        end_BS: The number of trunk tokens that each generation prompt attends to.
        length: T. Shorter trunks are padded at the end, and no token attends to the padding.
        depth: O. The first tokens of all generation prompts come first, then the second tokens, ...
    """
    device, (rows, width) = end_BS.device, end_BS.shape
    trunk_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    sees_trunk_BST = torch.arange(length, device=device) < end_BS[:, :, None]
    earlier_OO = torch.ones(depth, depth, dtype=torch.bool, device=device).tril()
    own_QQ = torch.kron(earlier_OO, torch.eye(width, dtype=torch.bool, device=device))
    above_BTK = torch.nn.functional.pad(trunk_TT, (0, depth * width)).expand(rows, -1, -1)
    below_BQK = torch.cat([sees_trunk_BST.repeat(1, depth, 1), own_QQ.expand(rows, -1, -1)], 2)
    return torch.cat([above_BTK, below_BQK], 1)
