"""Attention over a prefix tree without most of what its mask hides, where torch has no kernel that skips it.

A token sees its ancestors alone, so a few neighbouring queries see few of a large tree's keys. Scaled dot product
attention computes what its mask hides; so here it gets one block of queries after the other, each with the keys that
any query of it sees. The result is the same to rounding, forward and backward.

Shape legend: T tokens of a tree, Q queries of a block, K keys that they see, H heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCKWISE = "sdpa_blockwise"  # its name among the attentions of transformers
GROUPED = "sdpa_grouped"  # the same, see `grouped_attention`
FEW_QUERIES = 256  # of a head group, for which keys and values would be copied for each of its heads
QUERIES = 128  # of a block: fewer see fewer hidden keys, but take more calls


@dataclass(frozen=True)
class QueryBlocks:
    """Some queries of a tree, block by block, and the keys that each block sees."""

    queries: Tensor  # int64, where in the tree they are
    keys: Tensor  # int64, the same of the first block's keys, then of the second's, ...
    masks: list[Tensor]  # of each block (1, 1, Q, K) bool: which query sees which key


@dataclass(frozen=True)
class TreeBlocks:
    """What blockwise attention needs to know of a tree; found once, used by all layers."""

    every: QueryBlocks
    read: QueryBlocks  # of the last layer: no one reads its other states


def tree_blocks(subtree_end_T: Tensor, read: Tensor) -> TreeBlocks:
    """The blocks of a tree.

    Args:
        subtree_end_T: See `datamodules.batching.prefix_tree.Tree`.
        read: Which tokens' final states will be read, each once.
    """
    every = torch.arange(len(subtree_end_T), device=subtree_end_T.device)
    return TreeBlocks(_blocks(subtree_end_T, every), _blocks(subtree_end_T, read))


def _blocks(subtree_end_T: Tensor, queries: Tensor) -> QueryBlocks:
    keys, masks = [], []
    for query_Q in queries.split(QUERIES):
        seen_T = (torch.arange(len(subtree_end_T), device=query_Q.device) <= query_Q.max()) & (
            subtree_end_T > query_Q.min()
        )
        key_K = seen_T.nonzero()[:, 0]
        keys.append(key_K)
        masks.append(((key_K <= query_Q[:, None]) & (query_Q[:, None] < subtree_end_T[key_K]))[None, None])
    return QueryBlocks(queries, torch.cat(keys), masks)


def register() -> None:
    """Make these attentions some of those that transformers knows."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, attention in ((BLOCKWISE, blockwise_attention), (GROUPED, grouped_attention)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)


def blockwise_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree_blocks: TreeBlocks | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What sdpa of transformers gives: of rows by calling it, of a tree by calling it for each block.

    Args:
        module: A layer's attention.
        query: (1, H, T, D).
        key: (1, H, T, D), or fewer heads.
        value: As `key`.
        attention_mask: The mask of rows.
        tree_blocks: Of a tree, handed down by the backbone.
        options: What else a backbone gives its attention, such as scaling and dropout.

    Returns:
        (1, T, H, D); in the last layer 0 but for the states that are read.
    """
    from transformers import AttentionInterface

    sdpa = AttentionInterface()["sdpa"]
    if tree_blocks is None:
        return sdpa(module, query, key, value, attention_mask, **options)
    is_last = getattr(module, "layer_idx", None) == module.config.num_hidden_layers - 1
    blocks = tree_blocks.read if is_last else tree_blocks.every
    if is_last:
        query = query.index_select(2, blocks.queries)
    queries, keys = ([mask.shape[side] for mask in blocks.masks] for side in (-2, -1))
    # One gather and one split for all blocks: so their gradients are added up once.
    key_blocks, value_blocks = (states.index_select(2, blocks.keys).split(keys, 2) for states in (key, value))
    parts = zip(query.split(queries, 2), key_blocks, value_blocks, blocks.masks, strict=True)
    output = torch.cat([sdpa(module, *part, **options)[0] for part in parts], dim=1)
    if is_last:
        zeros = output.new_zeros(1, key.shape[2], *output.shape[2:])
        output = zeros.index_copy(1, blocks.queries, output)
    return output, None


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What sdpa of transformers gives, without copying keys and values for each head that shares them.

    Under a mask, transformers repeats the keys and values of a group for each of its heads. Where few tokens read a
    long cache, that takes longer than all else. Here the heads of a group are more queries to the same keys.

    Args:
        module: A layer's attention.
        query: (B, H, T, D).
        key: (B, H / heads of a group, K, D).
        value: As `key`.
        attention_mask: (B, 1, T, K) or none.
        options: What else a backbone gives its attention, such as scaling.

    Returns:
        (B, T, H, D).
    """
    from transformers import AttentionInterface

    rows, heads, tokens, size = query.shape
    group = heads // key.shape[1]
    extra = options.get("position_bias") is not None or options.get("softcap") is not None or options.get("dropout")
    if attention_mask is None or group == 1 or group * tokens > FEW_QUERIES or attention_mask.shape[1] > 1 or extra:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, heads // group, group * tokens, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, group, 1),
        scale=options.get("scaling"),
    )
    return output.reshape(rows, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None
