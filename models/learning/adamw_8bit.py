"""AdamW with 8-bit moments and, for weights stored in bfloat16, 8 more bits of each weight.

Per bfloat16 weight: 2 bytes of its own, 1 that continues it to 24 bits, 2 of moments and an eighth of scales. PyTorch's
AdamW on float32 masters takes 12, and 2 for the weights to compute with. The idea (split master weights, companded
8-bit moments) is that of FlashOptim (arXiv:2602.23349). Scales are float32 here, for the root of a second moment may be
smaller than float16 can hold. And what a rounding to the nearest would leave as it was, step for step, is rounded at
random, so that it is right on average: which way follows from step and place alone, the same on every rank.

All is elementwise, or within a block of neighbours in a row, so that shards of rows are updated as the whole is. On a
GPU the update of a weight is one compiled kernel.

Shape legend: G blocks, B values of a block.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from datamodules.errors import UserError
from models.networks.sharding import first_place, local, zeros_as

BLOCK = 64  # values that share a scale
SIGNED, UNSIGNED = 127, 255  # the greatest codes of a moment
LEAST = 1e-30  # what a scale of zeros is taken for
OF_WEIGHTS, OF_STEPS = 0x85EBCA77, 0xC2B2AE3D  # how far apart, in all places, those of two weights or steps begin


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay and bias correction as in `torch.optim.AdamW`.

    Args:
        params: Weights, or groups of them, in float32 or bfloat16, all on one device; whole ones, or DTensors that
            are cut into rows.
        lr: Learning rate.
        betas: How much of the first and second moment a step keeps.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.

    Attributes:
        gradient_scale: A factor () on the next step's gradients, on their device: clipping, without reading and writing
            all gradients once more.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.gradient_scale: Tensor | None = None
        self._places: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient. It waits for no device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._places is None:
            self._places = _places([weight for group in self.param_groups for weight in group["params"]])
        device = self._places.device
        scale = (
            torch.ones((), dtype=torch.float32, device=device) if self.gradient_scale is None else self.gradient_scale
        )
        places = iter(self._places)
        for group in self.param_groups:
            group["step"] += 1
            numbers, mark = _numbers(group, device), _int32(group["step"] * OF_STEPS)
            for weight, place in zip(group["params"], places, strict=False):
                if weight.grad is not None:
                    self._update(weight, numbers, scale, place + mark)
        self.gradient_scale = None
        return loss

    def _update(self, weight: Tensor, numbers: Tensor, scale: Tensor, place: Tensor) -> None:
        state = self.state[weight]
        if not state:
            state.update({name: zeros_as(weight, shape, dtype) for name, (shape, dtype) in layout(weight).items()})
        part, gradient = local(weight), local(weight.grad)  # type: ignore[arg-type]
        if part.numel():
            width = BLOCK if "exp_avg_scale" in state else part.numel()
            # Without `.data`, the compiler would look at what each of them is a view of.
            rows = {name: local(value).view(-1, 1 if "scale" in name else width).data for name, value in state.items()}
            update = _compiled if part.device.type == "cuda" else _update
            update(part.view(-1, width).data, gradient.reshape(-1, width).data, rows, scale, place.data, numbers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave.

        Raises:
            UserError: It is another optimizer's.
        """
        super().load_state_dict({**state_dict, "state": {}})  # which would cast codes and scales to the weights' dtype
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        self.state = defaultdict(dict)
        for number, weight in zip(numbers, weights, strict=True):
            kept = state_dict["state"].get(number, {})
            if kept and {name: (value.shape, value.dtype) for name, value in kept.items()} != layout(weight):
                raise UserError(
                    "model.optimizer: the checkpoint holds another optimizer's state, or one for another model.dtype",
                    "Resume with the model.optimizer and model.dtype of the run, or start a new run.",
                )
            if kept:
                self.state[weight] = {name: value.to(weight.device) for name, value in kept.items()}


def layout(weight: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of what is kept of a weight; the moments of vectors, and of odd matrices, stay in float32."""
    kept = {}
    if weight.dtype == torch.bfloat16:
        kept["remainder"] = (weight.shape, torch.int8)
    if weight.ndim > 1 and weight.shape[-1] % BLOCK == 0:
        scales = torch.Size([*weight.shape[:-1], weight.shape[-1] // BLOCK])
        kept["exp_avg"], kept["exp_avg_scale"] = (weight.shape, torch.int8), (scales, torch.float32)
        kept["exp_avg_sq"], kept["exp_avg_sq_scale"] = (weight.shape, torch.uint8), (scales, torch.float32)
    else:
        kept["exp_avg"] = kept["exp_avg_sq"] = (weight.shape, torch.float32)
    return kept


def _update(
    weight_GB: Tensor, gradient_GB: Tensor, state: dict[str, Tensor], scale: Tensor, place: Tensor, numbers: Tensor
) -> None:
    """One step of one weight, in place.

    Args:
        weight_GB: float32 or bfloat16, in blocks, or in one row where moments are not in blocks.
        gradient_GB: Any floating dtype.
        state: See `layout`, in the same form.
        scale: () factor on the gradient.
        place: () int32, of the weight's first value.
        numbers: (6,) float32, see `_numbers`.
    """
    blocked = "exp_avg_scale" in state
    assert not blocked or weight_GB.shape[1] == BLOCK  # which makes it a constant: then all is one compiled kernel
    rate, decay, correction, keep_first, keep_second, eps = numbers.unbind()
    bits_GB = _random_bits(weight_GB.shape, place)
    gradient_GB = gradient_GB.float() * scale
    first_GB, root_GB = state["exp_avg"], state["exp_avg_sq"]
    if blocked:
        first_GB = _expand(first_GB, SIGNED) * state["exp_avg_scale"]
        root_GB = _expand(root_GB, UNSIGNED) * state["exp_avg_sq_scale"]
    second_GB = root_GB * root_GB if blocked else root_GB
    first_GB = first_GB * keep_first + gradient_GB * (1 - keep_first)
    second_GB = second_GB * keep_second + gradient_GB * gradient_GB * (1 - keep_second)

    if "remainder" not in state:
        weight_GB.copy_(weight_GB * decay - rate * first_GB / ((second_GB / correction).sqrt() + eps))
    else:
        master_GB = _join(weight_GB, state["remainder"])
        master_GB = master_GB * decay - rate * first_GB / ((second_GB / correction).sqrt() + eps)
        upper_GB, remainder_GB = _split(master_GB, bits_GB)
        weight_GB.copy_(upper_GB)
        state["remainder"].copy_(remainder_GB)
    if not blocked:
        state["exp_avg"].copy_(first_GB)
        state["exp_avg_sq"].copy_(second_GB)
        return
    scale_G1 = first_GB.abs().amax(1, keepdim=True)
    state["exp_avg_scale"].copy_(scale_G1)
    state["exp_avg"].copy_((_compress(first_GB, scale_G1) * SIGNED).round())
    root_GB = second_GB.sqrt()
    scale_G1 = root_GB.amax(1, keepdim=True)
    state["exp_avg_sq_scale"].copy_(scale_G1)
    # A second moment changes by a thousandth a step, much less than from one code to the next; and none becomes 0.
    chance_GB = ((bits_GB >> 8) & 0xFFFF) / 2**16
    code_GB = (_compress(root_GB, scale_G1) * UNSIGNED + chance_GB).floor().clamp(max=UNSIGNED)
    state["exp_avg_sq"].copy_(torch.where(root_GB > 0, code_GB.clamp(min=1), 0))


_compiled = torch.compile(_update, dynamic=True)  # which compiles at the first call


def _compress(value_GB: Tensor, scale_G1: Tensor) -> Tensor:
    """Signed roots of shares of a scale: small values differ by their size, as large ones do."""
    share_GB = value_GB / scale_G1.clamp(min=LEAST)
    return share_GB.sign() * share_GB.abs().sqrt()


def _expand(code_GB: Tensor, greatest: int) -> Tensor:
    """The shares of a scale that codes stand for."""
    root_GB = code_GB.float() / greatest
    return root_GB * root_GB.abs()


def _join(upper: Tensor, remainder: Tensor) -> Tensor:
    """The float32 number whose first 24 bits a bfloat16 number and its remainder are."""
    return (((upper.view(torch.int16).int() << 8) + remainder.int()) << 8).view(torch.float32)


def _split(value: Tensor, random_bits: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 number next to a float32 one, and what leads from it to the latter's first 24 bits.

    Those are rounded up or down at random, right on average. As integers, the bits of floating point numbers of one
    sign are in order, so that a remainder is a difference of integers, whatever the exponent.
    """
    bits_24 = (value.view(torch.int32) + (random_bits & 0xFF)) >> 8
    upper = (bits_24 + 128) >> 8
    return upper.short().view(torch.bfloat16), (bits_24 - (upper << 8)).to(torch.int8)


def _random_bits(shape: torch.Size, place: Tensor) -> Tensor:
    """A hash of each place: 24 bits of an int32 that look random.

    The multipliers are of Chris Wellons' search for integer hashes ("lowbias32").
    """
    rows, width = shape
    hash_GB = torch.arange(rows * width, dtype=torch.int32, device=place.device).view(rows, width) + place
    for shift, factor in ((16, 0x7FEB352D), (15, _int32(0x846CA68B))):
        hash_GB = (hash_GB ^ ((hash_GB >> shift) & (2 ** (32 - shift) - 1))) * factor
    return hash_GB ^ ((hash_GB >> 16) & 0xFFFF)


def _numbers(group: dict[str, Any], device: torch.device) -> Tensor:
    """What a step's updates have in common, in one copy to the device: see how `_update` takes it apart."""
    (keep_first, keep_second), rate, step = group["betas"], group["lr"], group["step"]
    numbers = torch.tensor(
        [
            rate / (1 - keep_first**step),
            1 - rate * group["weight_decay"],
            1 - keep_second**step,
            keep_first,
            keep_second,
            group["eps"],
        ],
        dtype=torch.float32,  # whatever a trainer has made the default
    )
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def _places(weights: list[Tensor]) -> Tensor:
    """Where the random bits of each weight's values begin, (N,) int32; those of a shard where its part does."""
    starts = [first_place(weight) + number * OF_WEIGHTS for number, weight in enumerate(weights)]
    return torch.tensor([_int32(start) for start in starts], dtype=torch.int32, device=local(weights[0]).device)


def _int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31
