"""Trials of a backbone before its first step: what they share, and whether rows that are padded together stay the same.

A trial computes the same in two ways and compares. A backbone with random weights hardly minds what it sees, so what
must not be seen is changed, and must change nothing at all; all else has to agree to float32's rounding.

Shape legend: R rows, D size of a state or number of logits.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from datamodules.batching.layouts import Inputs, RowsLayout
from datamodules.errors import UserError
from datamodules.escaping import error_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How far states may differ, relatively: rounding, by the dtype that they are computed in. In float32, sums of 14,336
# products in another order differ by 1e-5 after a few dozen layers; what a network sees and should not changes more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NO_DIFFERENCE = 1e-6  # where the same computation is repeated, and only what must not be seen is another
HALF = (torch.float16, torch.bfloat16)
FEW = 7  # tokens of a short row
LEAST = 16  # tokens of a long one
REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, LookupError)


def tried(model: "PreTrainedModel", what: str, trial: Callable[[], str | None]) -> str | None:
    """What a trial finds wrong with a network in evaluation mode, or how that refuses `what`; None if all is well."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), uncompiled(model), _whole_float32():
            return trial()
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return f"it refuses {what} ({type(error).__name__}: {error_text(error, 120)})"
    finally:
        model.train(training)


@contextlib.contextmanager
def uncompiled(model: "PreTrainedModel") -> Iterator[None]:
    """Within it, what is compiled runs as it was written: to compile for a few odd lengths takes a minute."""
    if model.config._attn_implementation != "flex_attention" and "torch._dynamo" not in sys.modules:
        yield  # nothing has been compiled, and the import takes seconds
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def finely_tried(model: "PreTrainedModel", trial: Callable[[], str | None]) -> str | None:
    """What a trial finds in float32, also of a network whose weights have 16 bits.

    In 16 bits rounding hides that a layer sees 4,000 tokens and not 4,096. Where a network does not compute in another
    dtype than its own, such as in shards, its own has to do.
    """
    with _without_flex_attention(model):
        if not _has_half_weights(model):
            return trial()
        try:
            with _in_float32(model):
                return trial()
        except REFUSALS:
            return trial()


def tolerance(model: "PreTrainedModel", dtype: torch.dtype) -> float:
    """How far a model's states, computed in a dtype, may differ between two ways to compute the same."""
    rounds_inputs = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())  # to 8 bits
    return max(TOLERANCE[dtype], TOLERANCE[torch.bfloat16] if rounds_inputs else 0.0)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The greatest relative difference of some states or logits (N, D)."""
    found, expected = found.float(), expected.float()
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def difference_problem(model: "PreTrainedModel", found_ND: Tensor, expected_ND: Tensor, what: str) -> str | None:
    """`what`, with how far states or logits (N, D) are from those expected; None if that is rounding."""
    difference = relative_difference(found_ND, expected_ND)
    if difference <= tolerance(model, found_ND.dtype):
        return None
    return f"{what} (relative difference {difference:.1e})"


def random_tokens(model: "PreTrainedModel", number: int, seed: int = 0) -> list[int]:
    """Token ids from 4 on, which leaves three to tell rows apart by, and never the last one."""
    most = model.config.get_text_config().vocab_size - 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, most, (number,), generator=generator, device="cpu").tolist()


def padding_problem(model: "PreTrainedModel", read: Callable[[Inputs], Tensor], longest: int) -> str | None:
    """How rows that are padded together differ from the same rows one by one; None if they do not.

    Args:
        model: Any model of transformers.
        read: What is read of padded rows, (R, D).
        longest: Tokens of the longest row.

    Raises:
        UserError: It cannot read a single row.
    """
    tokens = random_tokens(model, max(longest, LEAST))
    short, shorter, whole = 0, 1, 2
    pad_id = model.config.get_text_config().pad_token_id or 0
    layout = RowsLayout([tokens[:FEW], tokens[1:], tokens], pad_id, micro_batch_size=3)
    device = model.get_input_embeddings().weight.device

    def read_rows(*rows: int) -> Tensor:
        inputs = cast("dict[str, Tensor]", layout.lay_out(rows).inputs)
        placed: Any = {name: value.to(device) for name, value in inputs.items()}
        return read(placed)

    def one_after_the_other() -> str | None:
        before, _, _, after = (read_rows(row) for row in (shorter, short, whole, shorter))
        changes = relative_difference(after, before) > NO_DIFFERENCE
        return "what it makes of a row depends on the rows that it read before" if changes else None

    def together() -> str | None:
        alone, beside_longer = read_rows(short), read_rows(short, whole)[:1]
        difference = relative_difference(beside_longer, alone)
        if difference <= tolerance(model, alone.dtype):
            return None
        return f"a row beside a longer one gives other figures than alone (relative difference {difference:.1e})"

    if refusal := tried(model, "rows", one_after_the_other):
        raise UserError(
            f"model.backbone: {type(model).__name__} cannot read rows of {len(tokens)} tokens: {refusal}",
            "Use another backbone, or a smaller data.max_length.",
        )
    return tried(model, "padded rows", lambda: finely_tried(model, together))


def _has_half_weights(model: nn.Module) -> bool:
    return any(parameter.dtype in HALF for parameter in model.parameters())


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Within it, products of float32 are not rounded to fewer bits, as a GPU may be told to do."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def _without_flex_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Within it, sdpa with the same mask: what is not compiled of FlexAttention holds all scores of long texts."""
    own = model.config._attn_implementation
    if own == "flex_attention":
        with contextlib.suppress(ValueError):  # a backbone may have more in its attention than sdpa can
            model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextlib.contextmanager
def _in_float32(model: "PreTrainedModel") -> Iterator[None]:
    """Within it, modules compute with their weights in float32, made of those in 16 bits when a module's turn comes."""
    own: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, arguments: Any) -> None:
        own[module] = [(p, p.data) for p in module.parameters(recurse=False) if p.dtype in HALF]
        for parameter, data in own[module]:
            parameter.data = data.float()

    def give_back(module: nn.Module, arguments: Any, output: Any) -> None:
        for parameter, data in own.pop(module, ()):
            parameter.data = data

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                stack.enter_context(module.register_forward_pre_hook(widen))
                stack.enter_context(module.register_forward_hook(give_back, always_call=True))
        yield
