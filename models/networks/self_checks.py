"""Self-checks: before the first step, compute the same in two ways, and compare the results.

A backbone with random weights hardly depends on its input. So a check changes tokens that are masked, and requires
that no result changes. All other results must agree within the rounding of float32.

Shape legend: N rows or tokens, R rows, D size of a hidden state or number of logits.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from datamodules.batching.layouts import Inputs, RowsLayout
from datamodules.errors import UserError
from datamodules.escaping import error_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Accepted relative differences of hidden states, by the dtype of the computation. In float32, sums of 14,336 products
# in another order differ by 1e-5 after a few dozen layers. A missing mask on one token makes a larger difference.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
EXACT_TOLERANCE = 1e-6  # accepted if only masked tokens differ between two computations
HALF_PRECISION = (torch.float16, torch.bfloat16)
SHORT_LENGTH = 7  # tokens of a short row
MIN_LONG_LENGTH = 16  # least number of tokens of a long row
NETWORK_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, LookupError)


def reading_problem(
    model: "PreTrainedModel",
    what: str,
    attentions: Collection[str],
    lengths: tuple[str, int],
    short_check: Callable[[], str | None],
    long_check: Callable[[], str | None],
) -> str | None:
    """Check that a network gives the same results for an input, such as a tree, as for single rows.

    The attention must accept the masks, and its window must cover the longest row. Then a check with a few tokens runs,
    and one with as many tokens as the data have. Only long texts show a window under an unknown name, an attention
    that selects keys, and rotary factors that depend on the length.

    Args:
        model: A network of transformers. On the meta device only its configuration is checked.
        what: The name of the input, for the message if the network raises an error.
        attentions: The attentions that accept the masks.
        lengths: For messages, what has the greatest length, such as "rows"; and this length in tokens.
        short_check: Returns the problem, or None.
        long_check: Returns the problem, or None. It runs in float32 if the network can.

    Returns:
        The problem; None if there is none.
    """
    attention = model.config._attn_implementation
    if attention not in attentions:
        return f"attention {attention} accepts no custom mask"
    rows, longest = lengths
    window = attention_window(model.config)
    if window is not None and window < longest:
        return f"its layers attend to the last {window} tokens, and {rows} have up to {longest}"
    if model.device.type == "meta":
        return None
    return run_check(model, what, lambda: short_check() or run_in_float32(model, long_check))


def attention_window(config: Any) -> int | None:
    """The smallest attention window of a layer, in tokens; None if all layers attend to all earlier tokens."""
    kinds = getattr(config, "layer_types", None)
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    found = [getattr(config, name, None) for kind, name in windows.items() if kinds is None or kind in kinds]
    return min((window for window in found if window is not None), default=None)


def run_check(model: "PreTrainedModel", what: str, check: Callable[[], str | None]) -> str | None:
    """Run a check in evaluation mode, without gradients and compiled code.

    Args:
        model: The network.
        what: The name of the input, for the message if the network raises an error.
        check: Returns the problem, or None.

    Returns:
        The problem, such as an error that the network raised; None if there is none.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), uncompiled(model), _full_float32_products():
            return check()
    except torch.OutOfMemoryError:
        raise
    except NETWORK_ERRORS as error:
        return f"it refuses {what} ({type(error).__name__}: {error_text(error, 120)})"
    finally:
        model.train(training)


@contextlib.contextmanager
def uncompiled(model: "PreTrainedModel") -> Iterator[None]:
    """Run compiled code eagerly: compiling for a few odd lengths takes a minute."""
    if model.config._attn_implementation != "flex_attention" and "torch._dynamo" not in sys.modules:
        yield  # nothing has been compiled, and the import takes seconds
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def run_in_float32(model: "PreTrainedModel", check: Callable[[], str | None]) -> str | None:
    """Run a check in float32, also for a network with 16-bit weights.

    In 16 bits, rounding would hide that a layer attends to 4,000 tokens instead of 4,096. A network that can compute
    only in its own dtype, such as a sharded one, is checked in this dtype.
    """
    with _without_flex_attention(model):
        if not any(parameter.dtype in HALF_PRECISION for parameter in model.parameters()):
            return check()
        try:
            with _weights_in_float32(model):
                return check()
        except NETWORK_ERRORS:
            return check()


def tolerance(model: "PreTrainedModel", dtype: torch.dtype) -> float:
    """The accepted relative difference between two ways to compute hidden states in a dtype."""
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):  # it rounds its inputs to 8 bits
        return max(TOLERANCE[dtype], TOLERANCE[torch.bfloat16])
    return TOLERANCE[dtype]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of two sets of hidden states or logits (N, D)."""
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def difference_problem(model: "PreTrainedModel", found_ND: Tensor, expected_ND: Tensor, what: str) -> str | None:
    """Compare hidden states or logits (N, D).

    Returns:
        `what` with the relative difference, or None if the difference is within the tolerance.
    """
    difference = relative_difference(found_ND, expected_ND)
    if difference <= tolerance(model, found_ND.dtype):
        return None
    return f"{what} (relative difference {difference:.1e})"


def random_tokens(model: "PreTrainedModel", count: int, seed: int = 0) -> list[int]:
    """Random token ids, except 0 to 3 and the last id, which callers use to tell rows apart."""
    last = model.config.get_text_config().vocab_size - 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, last, (count,), generator=generator, device="cpu").tolist()


def padding_problem(model: "PreTrainedModel", read: Callable[[Inputs], Tensor], longest: int) -> str | None:
    """Compare rows that are padded to one length with the same rows one by one.

    Args:
        model: Any network of transformers.
        read: Returns what the head reads of padded rows, (R, D).
        longest: Tokens of the longest row.

    Returns:
        What is wrong, or None.

    Raises:
        UserError: The network cannot read a single row.
    """
    tokens = random_tokens(model, max(longest, MIN_LONG_LENGTH))
    short, shorter, full = 0, 1, 2
    pad_id = model.config.get_text_config().pad_token_id or 0
    layout = RowsLayout([tokens[:SHORT_LENGTH], tokens[1:], tokens], pad_id, micro_batch_size=3)
    device = model.get_input_embeddings().weight.device

    def read_rows(*rows: int) -> Tensor:
        inputs = cast("dict[str, Tensor]", layout.lay_out(rows).inputs)
        on_device: Any = {name: value.to(device) for name, value in inputs.items()}
        return read(on_device)

    def one_by_one() -> str | None:
        before, _, _, after = (read_rows(row) for row in (shorter, short, full, shorter))
        if relative_difference(after, before) > EXACT_TOLERANCE:
            return "its result for a row depends on the rows that it read before"
        return None

    def together() -> str | None:
        alone, beside_longer = read_rows(short), read_rows(short, full)[:1]
        return difference_problem(
            model, beside_longer, alone, "a row gives other results beside a longer one than alone"
        )

    if refusal := run_check(model, "rows", one_by_one):
        raise UserError(
            f"model.backbone: {type(model).__name__} cannot read rows of {len(tokens)} tokens: {refusal}",
            "Use another backbone, or a smaller data.max_length.",
        )
    return run_check(model, "padded rows", lambda: run_in_float32(model, together))


@contextlib.contextmanager
def _full_float32_products() -> Iterator[None]:
    """Compute float32 products in full precision, even if the user has allowed less on a GPU."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def _without_flex_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Use sdpa with the same mask instead of FlexAttention, which stores all scores if it is not compiled."""
    own = model.config._attn_implementation
    if own == "flex_attention":
        with contextlib.suppress(ValueError):  # the backbone's attention has a part that sdpa lacks
            model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextlib.contextmanager
def _weights_in_float32(model: "PreTrainedModel") -> Iterator[None]:
    """Convert each module's 16-bit weights to float32 while the module runs."""
    own: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def convert(module: nn.Module, arguments: Any) -> None:
        own[module] = [(p, p.data) for p in module.parameters(recurse=False) if p.dtype in HALF_PRECISION]
        for parameter, data in own[module]:
            parameter.data = data.float()

    def restore(module: nn.Module, arguments: Any, output: Any) -> None:
        for parameter, data in own.pop(module, ()):
            parameter.data = data

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.enter_context(module.register_forward_pre_hook(convert))
                stack.enter_context(module.register_forward_hook(restore, always_call=True))
        yield
