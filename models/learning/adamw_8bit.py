"""AdamW with 8-bit moments and, for weights stored in bfloat16, 8 more bits of each weight.

A bfloat16 weight takes 2 bytes, 1 byte for 8 more bits, 2 bytes for its moments, and an eighth of a byte for scales.
PyTorch's AdamW takes 12 bytes with float32 master weights, and 2 for the weights of the computation. The method (split
master weights, companded 8-bit moments) is FlashOptim's (arXiv:2602.23349). There are two differences. Scales are
float32, because the root of a second moment can be smaller than float16 allows. And rounding is stochastic where
rounding to the nearest number would never change the value: the result is right on average. The random bits depend
only on the step and the index, so they are the same on each rank.

All operations are elementwise, or within a block of neighbours in a row. So shards of rows are updated like the full
tensor. On a GPU the update of a weight is one compiled kernel.

Shape legend: G blocks, B values of a block.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from datamodules.errors import UserError
from models.networks.sharding import first_index, local_shard, zeros_as

BLOCK = 64  # values that share a scale
SIGNED, UNSIGNED = 127, 255  # the largest codes of a moment
MIN_SCALE = 1e-30  # the smallest scale, for a block of zeros
# Offsets of the random numbers of one weight, and of one step, from those of the previous one.
WEIGHT_OFFSET, STEP_OFFSET = 0x85EBCA77, 0xC2B2AE3D


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay and bias correction as in `torch.optim.AdamW`.

    Args:
        params: Weights, or groups of them, in float32 or bfloat16, all on one device. DTensors must be sharded by
            rows.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.

    Attributes:
        gradient_scale: A factor () on the next step's gradients, on their device. It clips gradients without another
            pass over them.
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
        self._offsets: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each weight that has a gradient, without waiting for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._offsets is None:
            self._offsets = _offsets([weight for group in self.param_groups for weight in group["params"]])
        device = self._offsets.device
        scale = (
            torch.ones((), dtype=torch.float32, device=device) if self.gradient_scale is None else self.gradient_scale
        )
        offsets = iter(self._offsets)
        for group in self.param_groups:
            group["step"] += 1
            factors, step_offset = _factors(group, device), _int32(group["step"] * STEP_OFFSET)
            for weight, offset in zip(group["params"], offsets, strict=False):
                if weight.grad is not None:
                    self._update(weight, factors, scale, offset + step_offset)
        self.gradient_scale = None
        return loss

    def _update(self, weight: Tensor, factors: Tensor, scale: Tensor, offset: Tensor) -> None:
        state = self.state[weight]
        if not state:
            state.update({name: zeros_as(weight, shape, dtype) for name, (shape, dtype) in layout(weight).items()})
        part, gradient = local_shard(weight), local_shard(weight.grad)  # type: ignore[arg-type]
        if part.numel():
            width = BLOCK if "exp_avg_scale" in state else part.numel()
            # `.data`, because the compiler would also trace the tensors that these are views of.
            rows = {
                name: local_shard(value).view(-1, 1 if "scale" in name else width).data for name, value in state.items()
            }
            update = _compiled() if part.device.type == "cuda" else _update
            update(part.view(-1, width).data, gradient.reshape(-1, width).data, rows, scale, offset.data, factors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict.

        Raises:
            UserError: It is another optimizer's.
        """
        super().load_state_dict({**state_dict, "state": {}})  # it would cast codes and scales to the weights' dtype
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        self.state = defaultdict(dict)
        for index, weight in zip(indices, weights, strict=True):
            saved = state_dict["state"].get(index, {})
            if saved and {name: (value.shape, value.dtype) for name, value in saved.items()} != layout(weight):
                raise UserError(
                    "model.optimizer: the checkpoint has another optimizer's state, or one for another model.dtype",
                    "Resume with the model.optimizer and model.dtype of the run, or start a new run.",
                )
            if saved:
                self.state[weight] = {name: value.to(weight.device) for name, value in saved.items()}


def layout(weight: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor in a weight's state.

    Moments of vectors, and of matrices whose rows are not multiples of `BLOCK`, are float32.
    """
    tensors = {}
    if weight.dtype == torch.bfloat16:
        tensors["remainder"] = (weight.shape, torch.int8)
    if weight.ndim > 1 and weight.shape[-1] % BLOCK == 0:
        scales = torch.Size([*weight.shape[:-1], weight.shape[-1] // BLOCK])
        tensors["exp_avg"], tensors["exp_avg_scale"] = (weight.shape, torch.int8), (scales, torch.float32)
        tensors["exp_avg_sq"], tensors["exp_avg_sq_scale"] = (weight.shape, torch.uint8), (scales, torch.float32)
    else:
        tensors["exp_avg"] = tensors["exp_avg_sq"] = (weight.shape, torch.float32)
    return tensors


def _update(
    weight_GB: Tensor, gradient_GB: Tensor, state: dict[str, Tensor], scale: Tensor, offset: Tensor, factors: Tensor
) -> None:
    """One step of one weight, in place.

    Args:
        weight_GB: float32 or bfloat16, in blocks; in one row if the moments are not in blocks.
        gradient_GB: Any floating dtype.
        state: See `layout`; each tensor shaped as the weight.
        scale: () factor on the gradient.
        offset: () int32, where the random numbers of the weight's values begin.
        factors: (6,) float32, see `_factors`.
    """
    blocked = "exp_avg_scale" in state
    assert not blocked or weight_GB.shape[1] == BLOCK  # a constant width, so that all is one compiled kernel
    rate, decay, correction, beta_1, beta_2, eps = factors.unbind()
    bits_GB = _random_bits(weight_GB.shape, offset)
    gradient_GB = gradient_GB.float() * scale
    first_GB, root_GB = state["exp_avg"], state["exp_avg_sq"]
    if blocked:
        first_GB = _expand(first_GB, SIGNED) * state["exp_avg_scale"]
        root_GB = _expand(root_GB, UNSIGNED) * state["exp_avg_sq_scale"]
    second_GB = root_GB * root_GB if blocked else root_GB
    first_GB = first_GB * beta_1 + gradient_GB * (1 - beta_1)
    second_GB = second_GB * beta_2 + gradient_GB * gradient_GB * (1 - beta_2)

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
    # A second moment changes by a thousandth per step, much less than the distance of two codes. None becomes 0.
    chance_GB = ((bits_GB >> 8) & 0xFFFF) / 2**16
    code_GB = (_compress(root_GB, scale_G1) * UNSIGNED + chance_GB).floor().clamp(max=UNSIGNED)
    state["exp_avg_sq"].copy_(torch.where(root_GB > 0, code_GB.clamp(min=1), 0))


@functools.cache
def _compiled() -> Callable[..., None]:
    """The update as one kernel, from the first step on. To import the compiler takes most of a second."""
    return torch.compile(_update, dynamic=True)


def _compress(value_GB: Tensor, scale_G1: Tensor) -> Tensor:
    """Signed square roots of values relative to a scale. They resolve small values better than equal steps."""
    share_GB = value_GB / scale_G1.clamp(min=MIN_SCALE)
    return share_GB.sign() * share_GB.abs().sqrt()


def _expand(code_GB: Tensor, largest: int) -> Tensor:
    """The values, relative to a scale, of codes."""
    root_GB = code_GB.float() / largest
    return root_GB * root_GB.abs()


def _join(upper: Tensor, remainder: Tensor) -> Tensor:
    """The float32 number with the 24 bits of a bfloat16 number and its remainder."""
    return (((upper.view(torch.int16).int() << 8) + remainder.int()) << 8).view(torch.float32)


def _split(value: Tensor, random_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into the nearest bfloat16 numbers and remainders of 8 bits.

    The 24 bits of both are rounded stochastically. The bits of floating point numbers of one sign are ordered as
    integers. So the remainder is a difference of integers, for each exponent.
    """
    bits_24 = (value.view(torch.int32) + (random_bits & 0xFF)) >> 8
    upper = (bits_24 + 128) >> 8
    return upper.short().view(torch.bfloat16), (bits_24 - (upper << 8)).to(torch.int8)


def _random_bits(shape: torch.Size, offset: Tensor) -> Tensor:
    """24 pseudorandom bits for each index, as int32: a hash of offset + index.

    The multipliers are from Chris Wellons' search for integer hashes ("lowbias32").
    """
    rows, width = shape
    hash_GB = torch.arange(rows * width, dtype=torch.int32, device=offset.device).view(rows, width) + offset
    for shift, factor in ((16, 0x7FEB352D), (15, _int32(0x846CA68B))):
        hash_GB = (hash_GB ^ ((hash_GB >> shift) & (2 ** (32 - shift) - 1))) * factor
    return hash_GB ^ ((hash_GB >> 16) & 0xFFFF)


def _factors(group: dict[str, Any], device: torch.device) -> Tensor:
    """The factors of all updates of a step, (6,), in one copy to the device: see `_update`."""
    (beta_1, beta_2), rate, step = group["betas"], group["lr"], group["step"]
    factors = torch.tensor(
        [
            rate / (1 - beta_1**step),
            1 - rate * group["weight_decay"],
            1 - beta_2**step,
            beta_1,
            beta_2,
            group["eps"],
        ],
        dtype=torch.float32,  # the trainer may have set another default
    )
    return factors.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else factors


def _offsets(weights: list[Tensor]) -> Tensor:
    """Where the random numbers of each weight begin, (N,) int32; for a shard, those of its first value."""
    starts = [first_index(weight) + index * WEIGHT_OFFSET for index, weight in enumerate(weights)]
    return torch.tensor([_int32(start) for start in starts], dtype=torch.int32, device=local_shard(weights[0]).device)


def _int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31
