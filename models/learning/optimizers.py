"""Optimizers and learning rate schedules by name."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.prompting.tokenizers import SCRATCH
from models.learning.adamw_8bit import AdamW8bit

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
SHARDED = ("adamw", "adamw_8bit")  # their state can be sharded
KEEPS_ALL_UPDATES = ("adamw_8bit",)  # also those smaller than half the last bit of a weight
SAMPLED_WEIGHTS = 2**14  # weights of each tensor that `lost_updates` looks at
MAX_LOST = 0.05  # a run warns if rounding loses a larger share of the updates
FUSED = ("cpu", "cuda", "mps", "xpu")  # devices with PyTorch's fused AdamW
ScheduleName = Literal["linear", "cosine"]
log = logging.getLogger("proactive")


def default_learning_rate(backbone: str, adapter: Any | None) -> tuple[float, str]:
    """The peak learning rate if none is given, and the kind of training that it is the default for."""
    if adapter is not None:
        return 1e-4, "an adapter"
    return (1e-3, "a backbone from scratch") if backbone == SCRATCH else (2e-5, "a pretrained backbone")


def optimizer_class(name: OptimizerName) -> type[torch.optim.Optimizer] | Callable[..., torch.optim.Optimizer]:
    """The class of an optimizer.

    - adamw: PyTorch's. Weights stored in bfloat16, with 8 significant bits, lose smaller updates.
    - adamw_8bit: `models.learning.adamw_8bit.AdamW8bit`, which loses none.
    - paged_adamw_8bit: bitsandbytes', for float32 weights. Its state can be paged to the CPU's memory.

    Raises:
        UserError: bitsandbytes does not load.
    """
    if name == "adamw":
        return torch.optim.AdamW
    if name == "adamw_8bit":
        return AdamW8bit
    try:
        import bitsandbytes
    except Exception as error:  # errors of many types if its native library does not load
        raise UserError(
            f"model.optimizer: bitsandbytes does not load: {error_text(error, 200)}", "Use model.optimizer adamw_8bit."
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
    """An optimizer of the trained parameters, without weight decay on vectors (norms, biases).

    Args:
        parameters: All parameters of a module.
        name: See `optimizer_class`.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay; with 0, AdamW is Adam.
        loss_is_scaled: Whether the loss is scaled, as in 16-mixed precision. A fused optimizer would unscale the
            gradients itself, but after they are clipped. So none is fused then.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    parts = ([p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1])
    groups: list[dict[str, Any]] = [
        {"params": part, "weight_decay": _weight_decay(part, weight_decay)} for part in parts if part
    ]
    options: dict[str, Any] = {"lr": learning_rate}
    if name == "adamw":
        options["fused"] = not loss_is_scaled and all(parameter.device.type in FUSED for parameter in trained)
    optimizer = optimizer_class(name)(groups, **options)
    optimizer.register_load_state_dict_pre_hook(_refuse_other_state)
    return optimizer


def _refuse_other_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Refuse a state that does not fit the optimizer, because PyTorch would load it unchecked.

    Raises:
        UserError: The state has other hyperparameters or shapes.
    """
    try:
        for own, group in zip(optimizer.param_groups, state["param_groups"], strict=True):
            if own["betas"] != tuple(group["betas"]) or own["eps"] != group["eps"]:
                raise ValueError("betas or eps differ")
            for index, weight in zip(group["params"], own["params"], strict=True):
                saved = state["state"].get(index) or {}
                if saved and type(optimizer) is torch.optim.AdamW:
                    shapes = {name: value.shape for name, value in saved.items()}
                    if shapes != {"step": torch.Size([]), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}:
                        raise ValueError(f"the state of weight {index} has another shape")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"optimizer_states: those of the checkpoint do not fit the model: {type(error).__name__}: {error}",
            "Resume from another checkpoint, or start a new run.",
        ) from error


def _weight_decay(group: list[nn.Parameter], weight_decay: float) -> float:
    return weight_decay if group[0].ndim > 1 else 0.0


def lost_updates(parameters: Iterable[nn.Parameter], name: OptimizerName, learning_rate: float) -> float:
    """The share of the trained weights, 0 to 1, that an update does not change, because rounding undoes it.

    Adam changes a weight by about the learning rate. A 16-bit weight is then rounded to the nearest number. So a change
    that is smaller than half the distance between two such numbers is lost. This distance is `eps` times the largest
    power of 2 that is at most the weight.
    """
    if name in KEEPS_ALL_UPDATES:
        return 0.0
    from torch.distributed.tensor import DTensor

    lost = total = 0.0
    for parameter in parameters:
        if parameter.requires_grad and parameter.numel():
            total += parameter.numel()
            if parameter.dtype in (torch.bfloat16, torch.float16):
                weights: Any = parameter.detach()
                flat = (weights.to_local() if isinstance(weights, DTensor) else weights).flatten()
                sample = flat[:: max(len(flat) // SAMPLED_WEIGHTS, 1)].float()
                power = torch.frexp(sample).exponent - 1
                distance = torch.finfo(parameter.dtype).eps * torch.exp2(power.float())
                lost += parameter.numel() * float((learning_rate < distance / 2).float().mean()) if len(flat) else 0.0
    return lost / total if total else 0.0


def warn_of_lost_updates(parameters: Iterable[nn.Parameter], name: OptimizerName, learning_rate: float) -> None:
    """Log a warning if rounding loses more than `MAX_LOST` of the updates; see `lost_updates`."""
    lost = lost_updates(parameters, name, learning_rate)
    if lost > MAX_LOST:
        log.warning(
            f"model.learning_rate: rounding to 16 bits undoes steps of {learning_rate:g} in {lost:.0%} of the weights; "
            "use --model.optimizer adamw_8bit, which loses none, or --model.dtype float32 with --trainer.precision "
            "bf16-mixed"
        )


def clip(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Clip gradients by norm. AdamW8bit applies the factor when it reads them.

    Args:
        optimizer: The optimizer of the step.
        parameters: Parameters with gradients.
        max_norm: The largest norm after clipping.
        norm: (), the norm of the gradients.
    """
    if isinstance(optimizer, AdamW8bit):
        optimizer.gradient_scale = (max_norm / (norm.float() + 1e-6)).clamp(max=1.0)  # as in clip_grads_with_norm_
    else:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def build_schedule(
    optimizer: torch.optim.Optimizer, name: ScheduleName, warmup_ratio: float, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule with a linear warm-up over `warmup_ratio` of the steps, then a decay to zero at the last step."""
    from transformers import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=round(warmup_ratio * steps), num_training_steps=steps)


def set_options(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Set the options of an optimizer and its schedule after their states were loaded.

    Options that equal those of the loaded state leave it unchanged bit for bit.
    """
    schedule.base_lrs = [learning_rate for _ in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["weight_decay"] = _weight_decay(group["params"], weight_decay)
        group["initial_lr"] = learning_rate
        group["lr"] = learning_rate * factor(schedule.last_epoch)
