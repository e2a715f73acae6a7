"""Two attentions that save work where PyTorch has no kernel for it, and their registration with transformers.

- `blockwise_attention` is for prefix trees on a CPU. In a tree a token attends only to its ancestors, so a block of
  neighbouring queries attends to few of a large tree's keys. Scaled dot product attention (SDPA) also computes masked
  pairs. So it is called once per block of queries, with the keys that the block attends to. The result is the same up
  to rounding, forward and backward.
- `grouped_attention` is for generation with grouped-query attention. It does not copy keys and values.

Shape legend: T tokens of a tree, Q queries of a block, K keys, H heads, D head size, B rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCKWISE = "sdpa_blockwise"  # the name of `blockwise_attention` in transformers
GROUPED = "sdpa_grouped"  # the name of `grouped_attention` in transformers
MASKED_ATTENTIONS = ("sdpa", "eager", BLOCKWISE, GROUPED)  # those that take any mask as a tensor
MAX_GROUPED_QUERIES = 256  # per group of heads; with more queries, copying keys and values costs less
QUERY_BLOCK = 128  # queries per block. Smaller blocks waste less masked compute but need more kernel calls


@dataclass(frozen=True)
class QueryBlocks:
    """Queries of a tree in blocks, and the keys that each block attends to."""

    queries: Tensor  # int64, indices in the tree
    keys: Tensor  # int64, indices in the tree: the first block's keys, then the second's, ...
    masks: list[Tensor]  # per block (1, 1, Q, K) bool, true where the query attends to the key


@dataclass(frozen=True)
class TreeBlocks:
    """The blocks of a tree, computed once for all layers."""

    all_queries: QueryBlocks
    read_queries: QueryBlocks  # for the last layer: only these positions are read out


def tree_blocks(subtree_end_T: Tensor, read: Tensor) -> TreeBlocks:
    """The blocks of a tree.

    Args:
        subtree_end_T: (T,) int64, see `datamodules.batching.prefix_tree.Tree`.
        read: int64, the indices of the final hidden states that are read, each once and in order.
    """
    all_queries = torch.arange(len(subtree_end_T), device=subtree_end_T.device)
    return TreeBlocks(_blocks(subtree_end_T, all_queries), _blocks(subtree_end_T, read))


def _blocks(subtree_end_T: Tensor, queries: Tensor) -> QueryBlocks:
    keys, masks = [], []
    for query_Q in queries.split(QUERY_BLOCK):
        position_T = torch.arange(len(subtree_end_T), device=query_Q.device)
        attended_T = (position_T <= query_Q.max()) & (subtree_end_T > query_Q.min())
        key_K = attended_T.nonzero()[:, 0]
        keys.append(key_K)
        masks.append(((key_K <= query_Q[:, None]) & (query_Q[:, None] < subtree_end_T[key_K]))[None, None])
    return QueryBlocks(queries, torch.cat(keys), masks)


def register() -> None:
    """Register the attentions of this module with transformers."""
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
    """The sdpa attention of transformers, called once per block for a tree, and once for rows.

    Args:
        module: A layer's attention.
        query: (1, H, T, D).
        key: (1, H, T, D), or fewer heads.
        value: Shaped as `key`.
        attention_mask: The mask; used only for rows.
        tree_blocks: The blocks of a tree, passed on by the backbone; None for rows.
        options: Further arguments of the backbone, such as scaling and dropout.

    Returns:
        (1, T, H, D). In the last layer of a tree, states that are not read are 0.
    """
    from transformers import AttentionInterface

    sdpa = AttentionInterface()["sdpa"]
    if tree_blocks is None:
        return sdpa(module, query, key, value, attention_mask, **options)
    is_last = getattr(module, "layer_idx", None) == module.config.num_hidden_layers - 1
    blocks = tree_blocks.read_queries if is_last else tree_blocks.all_queries
    if is_last:
        query = query.index_select(2, blocks.queries)
    queries = [mask.shape[-2] for mask in blocks.masks]
    keys = [mask.shape[-1] for mask in blocks.masks]
    # One gather and one split for all blocks, so that their gradients are added up once.
    key_blocks = key.index_select(2, blocks.keys).split(keys, 2)
    value_blocks = value.index_select(2, blocks.keys).split(keys, 2)
    parts = zip(query.split(queries, 2), key_blocks, value_blocks, blocks.masks, strict=True)
    output = torch.cat([sdpa(module, *part, **options)[0] for part in parts], dim=1)
    if is_last:
        zeros = output.new_zeros(1, key.shape[2], *output.shape[2:])
        output = zeros.index_copy(1, blocks.queries, output)
    return output, None


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The sdpa attention of transformers, without copies of the keys and values that several heads share.

    With a mask, transformers copies the keys and values of a group for each of its heads. If few queries attend to a
    long cache, this takes most of the time. Here the heads of a group become further queries to the same keys.

    Args:
        module: A layer's attention.
        query: (B, H, T, D).
        key: (B, H / heads of a group, K, D).
        value: Shaped as `key`.
        attention_mask: (B, 1, T, K) or None.
        options: Further arguments of the backbone, such as scaling.

    Returns:
        (B, T, H, D).
    """
    from transformers import AttentionInterface

    rows, heads, tokens, size = query.shape
    group = heads // key.shape[1]
    many_queries = group == 1 or group * tokens > MAX_GROUPED_QUERIES
    extra = options.get("position_bias") is not None or options.get("softcap") is not None or options.get("dropout")
    if attention_mask is None or attention_mask.shape[1] > 1 or many_queries or extra:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, heads // group, group * tokens, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, group, 1),
        scale=options.get("scaling"),
    )
    return output.reshape(rows, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None
