"""How a causal backbone reads a prefix tree: its attention mask, and whether it reads one rightly.

Shape legend: R rows, T tokens of a tree, D hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from datamodules.batching.layouts import Inputs, TreeLayout, ancestors
from models.networks.attention import BLOCKWISE, register, tree_blocks
from models.networks.forward import as_forward
from models.networks.operations import embedding_count, weight_count
from models.networks.trials import (
    FEW,
    LEAST,
    NO_DIFFERENCE,
    difference_problem,
    finely_tried,
    random_tokens,
    relative_difference,
    tried,
)

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

BLOCK = 128  # FlexAttention's block of tokens
LEAST_HEAD = 16  # the size of a head that its kernels need at least
OTHER_STATES = "a tree gives other states than its rows one by one"
MASKED_ATTENTIONS = ("sdpa", "eager", "flex_attention", BLOCKWISE)  # those that take any mask


@as_forward
def read_tree(model: "PreTrainedModel", inputs: Inputs) -> Tensor:
    """The final hidden states (R, D) at the read-outs of a tree."""
    return tree_states(model, inputs, inputs["read_out"])[0, inputs["read_out"]]


def tree_states(model: "PreTrainedModel", inputs: Inputs, read: Tensor) -> Tensor:
    """The final hidden states (1, T, D) of a tree, as far as they are read.

    Args:
        model: Any model of transformers.
        inputs: A tree.
        read: int64, the places of the states that will be read; the others may be anything. Behind them may stand
            states of padding.
    """
    subtree_end_T = inputs["subtree_end"][0]
    input_ids, position_ids = inputs["input_ids"], inputs["position_ids"]
    attention = model.config._attn_implementation
    if attention == "flex_attention":
        padding = -len(subtree_end_T) % BLOCK  # tokens that no one sees, and that see no one but themselves
        input_ids, position_ids = (torch.nn.functional.pad(ids, (0, padding)) for ids in (input_ids, position_ids))
    options: dict[str, Any] = {}
    alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if attention == BLOCKWISE:
        read = read.unique()
        options["tree_blocks"] = tree_blocks(subtree_end_T, read)
        alone = _last_feed_forward_at(model, read, len(subtree_end_T))
    with alone:
        return model.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=tree_mask(subtree_end_T, attention, model.dtype),
            use_cache=False,
            **options,
        ).last_hidden_state


@contextlib.contextmanager
def _last_feed_forward_at(model: "PreTrainedModel", places: Tensor, tokens: int) -> Iterator[None]:
    """Within it, the last layer's feed-forward part computes some places alone: no one reads its states elsewhere."""
    layers = model.config.num_hidden_layers
    stacks = (m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers)
    feed_forward = getattr(next(stacks)[-1], "mlp", None)
    recomputes = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())  # when the hooks are gone
    if feed_forward is None or recomputes:
        yield
        return

    def take(module: torch.nn.Module, arguments: tuple[Tensor]) -> Tensor:
        return arguments[0].index_select(1, places)

    def put_back(module: torch.nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return output.new_zeros(1, tokens, output.shape[-1]).index_copy(1, places, output)

    with feed_forward.register_forward_pre_hook(take), feed_forward.register_forward_hook(put_back):
        yield


def tree_mask(subtree_end_T: Tensor, attention: str, dtype: torch.dtype) -> "Tensor | BlockMask":
    """The mask that lets each token of a tree see its ancestors, as transformers takes it.

    Args:
        subtree_end_T: (T,) int64, see `datamodules.batching.prefix_tree.Tree`.
        attention: sdpa takes (1, 1, T, T) bool; eager the same as 0 and the lowest number of `dtype`, to be added;
            flex_attention a BlockMask over T rounded up to whole blocks.
        dtype: That of the attention scores.
    """
    if attention == "flex_attention":
        return _block_mask(subtree_end_T)
    visible_11TT = ancestors(subtree_end_T)[None, None]
    if attention == "eager":
        return torch.zeros_like(visible_11TT, dtype=dtype).masked_fill(~visible_11TT, torch.finfo(dtype).min)
    return visible_11TT


def choose_attention(model: "PreTrainedModel", device: str, longest: int, largest: int | None = None) -> str | None:
    """Give a backbone the attention that computes least of what a tree's mask hides, if it takes it.

    Args:
        model: A classifier of transformers with the attention of its own choice, which it otherwise keeps.
        device: The type of its device. On others than cuda and cpu it keeps its own.
        longest: Tokens of the longest row.
        largest: Tokens of the largest tree.

    Returns:
        What `tree_problem` says with the attention that it then has.
    """
    own = model.config._attn_implementation
    better = {"cuda": "flex_attention", "cpu": BLOCKWISE if own == "sdpa" else own}.get(device, own)
    if better == "flex_attention" and _head_size(model) < LEAST_HEAD:  # which would show only when it is compiled
        better = own
    if better == BLOCKWISE:  # not where sdpa lacks something, such as a soft cap
        register()
    if better != own:
        with contextlib.suppress(ValueError):  # a backbone without it keeps its own
            model.set_attn_implementation(better)
            if tree_problem(model, longest, largest) is None:
                return None
            model.set_attn_implementation(own)
    return tree_problem(model, longest, largest)


def _head_size(model: "PreTrainedModel") -> int:
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)


def tree_problem(model: "PreTrainedModel", longest: int, largest: int | None = None) -> str | None:
    """What keeps a backbone from reading trees as it reads rows; None if nothing does.

    It is tried, first on short random rows that share their beginning, then on rows and a tree as long as the data
    makes them: a window of attention, whatever a configuration calls it, a choice of keys, or rotary factors that
    follow from the longest row show in long texts alone.

    Args:
        model: A sequence classifier of transformers. One without weights, on the meta device, is not tried.
        longest: Tokens of the longest row.
        largest: Tokens of the largest tree; if None, twice as many.
    """
    attention = model.config._attn_implementation
    if attention not in MASKED_ATTENTIONS:
        return f"attention {attention} takes no mask of our own"
    window = attention_window(model.config)
    if window is not None and window < longest:
        return f"its layers see {window} tokens back, and rows have up to {longest}"
    if model.device.type == "meta":
        return None
    tokens = max(longest, largest or 2 * longest)
    return tried(
        model, "them", lambda: _misread(model) or finely_tried(model, lambda: _misread_long(model, longest, tokens))
    )


def _misread(model: "PreTrainedModel") -> str | None:
    """How trees of two short rows differ from the rows, or None."""
    tokens = random_tokens(model, 24)
    trunk, left, other, right = (tokens[start : start + 6] for start in range(0, 24, 6))
    left, other, right = [*trunk, 1, *left], [*trunk, 2, *other], [*trunk, 3, *right[:4]]  # in this order in a tree
    left_TD, other_TD, right_TD = (read_row(model, row) for row in (left, other, right))
    if relative_difference(left_TD[: len(trunk)], other_TD[: len(trunk)]) > NO_DIFFERENCE:
        return "the states of its tokens depend on what follows them"
    merged_RD, beside_other_RD = (_read_rows_as_tree(model, [first, right]) for first in (left, other))
    if relative_difference(merged_RD[1], beside_other_RD[1]) > NO_DIFFERENCE:
        return "a row's state depends on the other rows of its tree"
    return difference_problem(model, merged_RD, torch.stack([left_TD[-1], right_TD[-1]]), OTHER_STATES)


def _misread_long(model: "PreTrainedModel", longest: int, tokens: int) -> str | None:
    """How a tree of so many tokens differs from its rows, of which the first is the longest; None if it does not.

    Far behind it in the tree stand a row that left it half-way and one that left it at the beginning, both short
    branches. In between, other branches fill the tree up.
    """
    longest = max(longest, LEAST)
    half, last = longest // 2, model.config.get_text_config().vocab_size - 1  # other rows go on with smaller tokens
    first, more = random_tokens(model, longest), random_tokens(model, tokens, seed=1)
    rows = [first, [*first[:half], last, *more[:FEW]], [*first[:FEW], last, *more[:FEW]]]
    branch = longest - half
    filling = [more[start : start + branch] for start in range(0, tokens - longest - 2 * FEW, branch)]
    found_RD = _read_rows_as_tree(model, [*rows, *([*first[:half], *part] for part in filling)])[: len(rows)]
    problem = difference_problem(model, found_RD, torch.stack([read_row(model, row)[-1] for row in rows]), OTHER_STATES)
    return problem and f"{problem}, in a tree of {tokens} tokens with rows of up to {longest}"


def _read_rows_as_tree(model: "PreTrainedModel", rows: list[list[int]]) -> Tensor:
    """The final states (R, D) at the ends of rows, in their order."""
    laid_out = TreeLayout(rows, token_budget=sum(map(len, rows))).lay_out(range(len(rows)))
    device, inputs = model.get_input_embeddings().weight.device, cast("dict[str, Tensor]", laid_out.inputs)
    placed: Any = {name: value.to(device) for name, value in inputs.items()}
    return read_tree(model, placed)[torch.tensor(laid_out.rows, device=device).argsort()]


@as_forward
def read_row(model: "PreTrainedModel", row: list[int]) -> Tensor:
    """The final states (T, D) of a row by itself."""
    input_ids_1T = torch.tensor([row], device=model.get_input_embeddings().weight.device)
    output = model.base_model(input_ids=input_ids_1T, attention_mask=torch.ones_like(input_ids_1T))
    return output.last_hidden_state[0]


def pair_cost(model: "PreTrainedModel") -> float:
    """What attention to one token more costs a token, in units of the layers' products with their weights.

    A product with P weights takes 2 P operations a token, attention 4 D a token and pair in each layer. Where hidden
    pairs are skipped, there is nothing to save by smaller trees.
    """
    if model.config._attn_implementation in ("flex_attention", BLOCKWISE):
        return 0.0
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    return 2 * layers * width / (weight_count(model.base_model) - embedding_count(model))


def attention_window(config: Any) -> int | None:
    """How many tokens back the layer of a backbone sees that sees the fewest; None if all see all."""
    kinds = getattr(config, "layer_types", None)
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    found = [getattr(config, name, None) for kind, name in windows.items() if kinds is None or kind in kinds]
    return min((window for window in found if window is not None), default=None)


def _block_mask(subtree_end_T: Tensor) -> "BlockMask":
    from torch.nn.attention.flex_attention import create_block_mask

    padding = -len(subtree_end_T) % BLOCK
    places = torch.arange(len(subtree_end_T), len(subtree_end_T) + padding, device=subtree_end_T.device)
    end = torch.cat([subtree_end_T, places + 1])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    return create_block_mask(sees, None, None, len(end), len(end), device=end.device, BLOCK_SIZE=BLOCK)
