"""How a causal backbone reads a prefix tree: its attention mask, and a self-check that it reads trees correctly.

Shape legend: R rows, T tokens of a tree, D hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from datamodules.batching.layouts import Inputs, TreeLayout, ancestors
from models.networks.attention import BLOCKWISE, MASKED_ATTENTIONS, register, tree_blocks
from models.networks.forward import as_forward
from models.networks.operations import embedding_count, weight_count
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
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

BLOCK = 128  # tokens of a block of FlexAttention
MIN_HEAD_SIZE = 16  # the smallest that FlexAttention's kernels support
OTHER_STATES = "a tree gives other states than its rows one by one"


@as_forward
def read_tree(model: "PreTrainedModel", inputs: Inputs) -> Tensor:
    """The final hidden states (R, D) at the read-outs of a tree."""
    return tree_states(model, inputs, inputs["read_out"])[0, inputs["read_out"]]


def tree_states(model: "PreTrainedModel", inputs: Inputs, read: Tensor) -> Tensor:
    """The final hidden states (1, T, D) of a tree.

    Args:
        model: Any causal model of transformers.
        inputs: A tree.
        read: int64, the indices of the states that the caller reads.

    Returns:
        The hidden states. Those that are not in `read` are undefined. States of padding may follow.
    """
    subtree_end_T = inputs["subtree_end"][0]
    input_ids, position_ids = inputs["input_ids"], inputs["position_ids"]
    attention = model.config._attn_implementation
    if attention == "flex_attention":
        padding = -len(subtree_end_T) % BLOCK  # padding tokens attend to themselves only
        input_ids = torch.nn.functional.pad(input_ids, (0, padding))
        position_ids = torch.nn.functional.pad(position_ids, (0, padding))
    options: dict[str, Any] = {}
    last_layer: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if attention == BLOCKWISE:
        read = read.unique()
        options["tree_blocks"] = tree_blocks(subtree_end_T, read)
        last_layer = _last_feed_forward_at(model, read, len(subtree_end_T))
    with last_layer:
        return model.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=tree_mask(subtree_end_T, attention, model.dtype),
            use_cache=False,
            **options,
        ).last_hidden_state


@contextlib.contextmanager
def _last_feed_forward_at(model: "PreTrainedModel", indices: Tensor, tokens: int) -> Iterator[None]:
    """Compute the last layer's feed-forward part only at some indices. Its other outputs are not used."""
    layers = model.config.num_hidden_layers
    stacks = (m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers)
    feed_forward = getattr(next(stacks)[-1], "mlp", None)
    # Gradient checkpointing recomputes the layer after the hooks are removed, so it computes all positions.
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if feed_forward is None or recomputes:
        yield
        return

    def select(module: torch.nn.Module, arguments: tuple[Tensor]) -> Tensor:
        return arguments[0].index_select(1, indices)

    def put_back(module: torch.nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return output.new_zeros(1, tokens, output.shape[-1]).index_copy(1, indices, output)

    with feed_forward.register_forward_pre_hook(select), feed_forward.register_forward_hook(put_back):
        yield


def tree_mask(subtree_end_T: Tensor, attention: str, dtype: torch.dtype) -> "Tensor | BlockMask":
    """The attention mask of a tree: each token attends to itself and its ancestors.

    Args:
        subtree_end_T: (T,) int64, see `datamodules.batching.prefix_tree.Tree`.
        attention: The attention implementation of the network.
        dtype: The dtype of the attention scores.

    Returns:
        For flex_attention a BlockMask over T rounded up to whole blocks. For eager (1, 1, T, T) of `dtype`, to be added
        to the scores: 0 or the lowest number. For all others (1, 1, T, T) bool, true if visible.
    """
    if attention == "flex_attention":
        return _block_mask(subtree_end_T)
    visible_11TT = ancestors(subtree_end_T)[None, None]
    if attention == "eager":
        return torch.zeros_like(visible_11TT, dtype=dtype).masked_fill(~visible_11TT, torch.finfo(dtype).min)
    return visible_11TT


def choose_attention(model: "PreTrainedModel", device: str, longest: int, largest: int | None = None) -> str | None:
    """Set the attention that computes the fewest masked pairs of a tree, if the backbone supports it.

    Args:
        model: A network of transformers with its default attention. It keeps this attention if no better one works.
        device: The type of its device. On devices other than cuda and cpu it keeps its attention.
        longest: Tokens of the longest row.
        largest: Tokens of the largest tree.

    Returns:
        The result of `tree_problem` with the attention that was chosen.
    """
    default = model.config._attn_implementation
    better = default
    if device == "cuda" and _head_size(model) >= MIN_HEAD_SIZE:  # smaller heads would fail, but only when compiled
        better = "flex_attention"
    if device == "cpu" and default == "sdpa":  # other attentions have features that sdpa lacks, such as a soft cap
        register()
        better = BLOCKWISE
    if better != default:
        with contextlib.suppress(ValueError):  # the backbone does not support it
            model.set_attn_implementation(better)
            if tree_problem(model, longest, largest) is None:
                return None
            model.set_attn_implementation(default)
    return tree_problem(model, longest, largest)


def _head_size(model: "PreTrainedModel") -> int:
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)


def tree_problem(model: "PreTrainedModel", longest: int, largest: int | None = None) -> str | None:
    """Check that a backbone reads trees as it reads single rows; see `reading_problem`.

    Args:
        model: A network of transformers. On the meta device only its configuration is checked.
        longest: Tokens of the longest row.
        largest: Tokens of the largest tree; if None, twice as many as the longest row has.

    Returns:
        What is wrong, or None.
    """
    tokens = max(longest, largest or 2 * longest)
    return reading_problem(
        model,
        "them",
        (*MASKED_ATTENTIONS, "flex_attention"),  # FlexAttention takes the same masks as a BlockMask
        ("rows", longest),
        lambda: _short_tree_problem(model),
        lambda: _long_tree_problem(model, longest, tokens),
    )


def _short_tree_problem(model: "PreTrainedModel") -> str | None:
    """Compare trees of two short rows with the rows."""
    tokens = random_tokens(model, 24)
    trunk, left, other, right = (tokens[start : start + 6] for start in range(0, 24, 6))
    left, other, right = [*trunk, 1, *left], [*trunk, 2, *other], [*trunk, 3, *right[:4]]  # in this order in a tree
    left_TD, other_TD, right_TD = (read_row(model, row) for row in (left, other, right))
    if relative_difference(left_TD[: len(trunk)], other_TD[: len(trunk)]) > EXACT_TOLERANCE:
        return "the states of its tokens depend on what follows them"
    beside_left_RD = _read_rows_as_tree(model, [left, right])
    beside_other_RD = _read_rows_as_tree(model, [other, right])
    if relative_difference(beside_left_RD[1], beside_other_RD[1]) > EXACT_TOLERANCE:
        return "a row's state depends on the other rows of its tree"
    return difference_problem(model, beside_left_RD, torch.stack([left_TD[-1], right_TD[-1]]), OTHER_STATES)


def _long_tree_problem(model: "PreTrainedModel", longest: int, tokens: int) -> str | None:
    """Compare a tree of `tokens` tokens with three of its rows.

    The first row is the longest. In the tree, branches that only fill it follow, then a row that branches off from the
    first one halfway, and one that branches off near the beginning. So the ends of the short rows are far from the
    tokens that they attend to.
    """
    longest = max(longest, MIN_LONG_LENGTH)
    half = longest // 2
    last = model.config.get_text_config().vocab_size - 1  # sorts behind the tokens of the filling branches
    first, more = random_tokens(model, longest), random_tokens(model, tokens, seed=1)
    rows = [first, [*first[:half], last, *more[:SHORT_LENGTH]], [*first[:SHORT_LENGTH], last, *more[:SHORT_LENGTH]]]
    branch = longest - half
    filling = [more[start : start + branch] for start in range(0, tokens - longest - 2 * SHORT_LENGTH, branch)]
    found_RD = _read_rows_as_tree(model, [*rows, *([*first[:half], *part] for part in filling)])[: len(rows)]
    expected_RD = torch.stack([read_row(model, row)[-1] for row in rows])
    problem = difference_problem(model, found_RD, expected_RD, OTHER_STATES)
    return problem and f"{problem}, in a tree of {tokens} tokens with rows of up to {longest}"


def _read_rows_as_tree(model: "PreTrainedModel", rows: list[list[int]]) -> Tensor:
    """The final hidden states (R, D) at the ends of rows that are laid out as one tree, in the order of `rows`."""
    laid_out = TreeLayout(rows, token_budget=sum(map(len, rows))).lay_out(range(len(rows)))
    device, inputs = model.get_input_embeddings().weight.device, cast("dict[str, Tensor]", laid_out.inputs)
    on_device: Any = {name: value.to(device) for name, value in inputs.items()}
    return read_tree(model, on_device)[torch.tensor(laid_out.rows, device=device).argsort()]


@as_forward
def read_row(model: "PreTrainedModel", row: list[int]) -> Tensor:
    """The final hidden states (T, D) of a single row."""
    input_ids_1T = torch.tensor([row], device=model.get_input_embeddings().weight.device)
    output = model.base_model(input_ids=input_ids_1T, attention_mask=torch.ones_like(input_ids_1T))
    return output.last_hidden_state[0]


def pair_cost(model: "PreTrainedModel") -> float:
    """The cost of attending to one more token, relative to the cost of one token in all linear layers.

    A product with P weights takes 2 P operations per token. Attention takes 4 D operations per layer and pair of
    tokens. If masked pairs are skipped, the result is 0, because smaller trees save nothing.
    """
    if model.config._attn_implementation in ("flex_attention", BLOCKWISE):
        return 0.0
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    return 2 * layers * width / (weight_count(model.base_model) - embedding_count(model))


def _block_mask(subtree_end_T: Tensor) -> "BlockMask":
    from torch.nn.attention.flex_attention import create_block_mask

    padding = -len(subtree_end_T) % BLOCK
    index = torch.arange(len(subtree_end_T), len(subtree_end_T) + padding, device=subtree_end_T.device)
    end = torch.cat([subtree_end_T, index + 1])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    return create_block_mask(sees, None, None, len(end), len(end), device=end.device, BLOCK_SIZE=BLOCK)
