"""Optimizers and learning rate schedules by name."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from models.learning.adamw_8bit import AdamW8bit

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
SHARDED = ("adamw", "adamw_8bit")  # whose state can be spread over ranks
LOSES_NOTHING = ("adamw_8bit",)  # of updates that are smaller than a weight's significant bits
SAMPLE = 2**14  # weights of each tensor that are looked at for such updates
FUSED = ("cpu", "cuda", "mps", "xpu")  # where PyTorch updates all parameters in one kernel
ScheduleName = Literal["linear", "cosine"]


def optimizer_maker(name: OptimizerName) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimizer of a name, given parameter groups and `lr`.

    - adamw: PyTorch's. Weights stored in bfloat16 lose updates smaller than their 8 significant bits.
    - adamw_8bit: `models.learning.adamw_8bit.AdamW8bit`, which loses none.
    - paged_adamw_8bit: bitsandbytes', for float32 weights; the GPU's memory pages its state to the host's.

    Raises:
        UserError: bitsandbytes does not load.
    """
    if name == "adamw":
        return torch.optim.AdamW
    if name == "adamw_8bit":
        return AdamW8bit
    try:
        import bitsandbytes
    except Exception as error:  # its import fails in many ways where its native library does not load
        raise UserError(
            f"model.optimizer: bitsandbytes does not load: {error}", "Use model.optimizer adamw_8bit."
        ) from error
    return bitsandbytes.optim.PagedAdamW8bit


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    name: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    *,
    loss_is_scaled: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer over the parameters that are trained; vectors (norms, biases) do not decay.

    Args:
        parameters: All parameters of a module.
        name: See `optimizer_maker`.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay; with 0, AdamW is Adam.
        loss_is_scaled: Whether gradients are those of a scaled loss, as in 16-mixed precision. A fused optimizer
            would take the scale back itself, after they were clipped; so none is fused then.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    parts = ([p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1])
    groups: list[dict[str, Any]] = [
        {"params": part, "weight_decay": _weight_decay(part, weight_decay)} for part in parts if part
    ]
    options: dict[str, Any] = {"lr": learning_rate}
    if name == "adamw":
        options["fused"] = not loss_is_scaled and all(parameter.device.type in FUSED for parameter in trained)
    optimizer = optimizer_maker(name)(groups, **options)
    optimizer.register_load_state_dict_pre_hook(_refuse_other_state)
    return optimizer


def _refuse_other_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Refuse a state of other weights, before PyTorch loads it as it is.

    Raises:
        UserError: It is such a one.
    """
    try:
        for own, group in zip(optimizer.param_groups, state["param_groups"], strict=True):
            if own["betas"] != tuple(group["betas"]) or own["eps"] != group["eps"]:
                raise ValueError("betas or eps are others")
            for number, weight in zip(group["params"], own["params"], strict=True):
                kept = state["state"].get(number) or {}
                if kept and type(optimizer) is torch.optim.AdamW:
                    shapes = {name: value.shape for name, value in kept.items()}
                    if shapes != {"step": torch.Size([]), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}:
                        raise ValueError(f"what is kept of weight {number} is not of its shape")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"optimizer_states: the checkpoint's do not fit the model: {type(error).__name__}: {error}",
            "Resume from another checkpoint, or start a new run.",
        ) from error


def _weight_decay(group: list[nn.Parameter], weight_decay: float) -> float:
    return weight_decay if group[0].ndim > 1 else 0.0


def lost_updates(parameters: Iterable[nn.Parameter], name: OptimizerName, learning_rate: float) -> float:
    """The share of the trained weights, 0 to 1, that an update of the size of the learning rate leaves as they are.

    Adam moves a weight by about the learning rate. Weights of 16 bits are rounded to the nearest afterwards, which
    undoes what is less than half the distance to the next one: `eps` times the greatest power of 2 below the weight.
    """
    if name in LOSES_NOTHING:
        return 0.0
    from torch.distributed.tensor import DTensor

    lost = total = 0.0
    for parameter in parameters:
        if parameter.requires_grad and parameter.numel():
            total += parameter.numel()
            if parameter.dtype in (torch.bfloat16, torch.float16):
                weights: Any = parameter.detach()
                flat = (weights.to_local() if isinstance(weights, DTensor) else weights).flatten()
                sample = flat[:: max(len(flat) // SAMPLE, 1)].float()
                power = torch.frexp(sample).exponent - 1
                distance = torch.finfo(parameter.dtype).eps * torch.exp2(power.float())
                lost += parameter.numel() * float((learning_rate < distance / 2).float().mean()) if len(flat) else 0.0
    return lost / total if total else 0.0


def clip(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], greatest: float, norm: Tensor) -> None:
    """Scale gradients down to a greatest norm, by what the optimizer reads them with if it can.

    Args:
        optimizer: What takes the step.
        parameters: With gradients.
        greatest: The norm that they may have.
        norm: (), the norm that they have.
    """
    if isinstance(optimizer, AdamW8bit):
        optimizer.gradient_scale = (greatest / (norm.float() + 1e-6)).clamp(max=1.0)  # as clip_grads_with_norm_ has it
    else:
        nn.utils.clip_grads_with_norm_(parameters, greatest, norm)


def build_schedule(
    optimizer: torch.optim.Optimizer, name: ScheduleName, warmup_ratio: float, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up linearly over `warmup_ratio` of the optimizer steps, then decay to zero at the last one."""
    from transformers import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=round(warmup_ratio * steps), num_training_steps=steps)


def set_options(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Give an optimizer and its schedule, whose state was loaded, these options from the next step on.

    What does not differ from the loaded state stays bit for bit what it is.
    """
    schedule.base_lrs = [learning_rate for _ in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["weight_decay"] = _weight_decay(group["params"], weight_decay)
        group["initial_lr"] = learning_rate
        rate = learning_rate * factor(schedule.last_epoch)
        if isinstance(group["lr"], torch.Tensor):  # as torchao keeps it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
