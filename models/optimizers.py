"""Optimizers and learning rate schedules by name."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from datamodules.errors import UserError

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
ScheduleName = Literal["linear", "cosine"]


def build_optimizer(
    parameters: Iterable[nn.Parameter], name: OptimizerName, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer over the parameters that are trained; vectors (norms, biases) do not decay.

    Args:
        parameters: All parameters of a module.
        name: adamw is PyTorch's, fused where the device has it; the 8-bit ones are bitsandbytes'.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay; with 0, AdamW is Adam.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "adamw":
        fused = all(p.device.type in ("cpu", "cuda", "xpu") for p in trained)
        return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)
    try:
        import bitsandbytes
    except Exception as error:  # its import fails in many ways where its native library does not load
        raise UserError(
            f"model.optimizer: bitsandbytes does not load: {error}", "Use model.optimizer adamw."
        ) from error
    kind = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[name]
    return kind(groups, lr=learning_rate)


def build_schedule(
    optimizer: torch.optim.Optimizer, name: ScheduleName, warmup_ratio: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm up linearly over `warmup_ratio` of the optimizer steps, then decay to zero at the last one."""
    from transformers import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=round(warmup_ratio * steps), num_training_steps=steps)
