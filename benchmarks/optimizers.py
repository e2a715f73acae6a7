"""Optimizers for weights in bfloat16: exactness, milliseconds per step, and bytes per weight.

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py --small true

torchao and FlashOptim (`pip install torchao flashoptim`) are left out if they are missing. FlashOptim needs a GPU. On a
GPU all run on the 7.5 billion weights of benchmarks/shapes/llama_3_1_8b.yaml. On a CPU they run on a small model, and
only exactness means anything. Prints one JSON object.
"""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import yaml
from gpu_recipe import SHAPE, SMALL, now
from jsonargparse import auto_cli
from torch import Tensor, nn

from models.judging.weights import best_device
from models.learning.adamw_8bit import AdamW8bit

RATE = 1e-5  # learning rate
UPDATE = 1e-4  # of a weight of 1, per step, in `learned`
Make = Callable[[Any, float], torch.optim.Optimizer]
Figures = dict[str, Any]


def _adamw(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, fused=True)


def _adamw_8bit(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return AdamW8bit(parameters, lr=rate)


def _torchao(parameters: Any, rate: float) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate, bf16_stochastic_round=True)  # type: ignore[no-any-return]


def _bitsandbytes(parameters: Any, rate: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate)  # type: ignore[no-any-return]


def _flashoptim(parameters: Any, rate: float) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(parameters, lr=rate)  # type: ignore[no-any-return]


OPTIMIZERS: dict[str, Make] = {
    "adamw_8bit": _adamw_8bit,
    "flashoptim": _flashoptim,
    "adamw, fused": _adamw,
    "bitsandbytes, 8 bits": _bitsandbytes,
    "torchao, 8 bits": _torchao,  # the last, because it compiles for half a minute
}


def optimizer_figures(small: bool = False) -> dict[str, Figures]:
    """The figures of each optimizer, or its error, and the `error` that rounding the exact weights alone would have.

    Args:
        small: Measure on a small model.
    """
    small = small or best_device().type == "cpu"
    config = SMALL | {"vocab_size": 512} if small else yaml.safe_load(SHAPE.read_text())["model"]["scratch"]
    exact, start = trained(_adamw, torch.float32)
    found: dict[str, Figures] = {"rounding": {"error": _distance(exact.bfloat16(), exact, start)}}
    for name, make in OPTIMIZERS.items():
        try:
            found[name] = {
                "learned": learned(make),
                "error": _distance(trained(make, torch.bfloat16)[0], exact, start),
                **costs(make, shapes(config)),
            }
        except Exception as error:  # one that is not installed or does not serve this device is no end of the others
            found[name] = {"error_message": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(found), flush=True)
    return found


def learned(make: Make, steps: int = 1000) -> float:
    """The share of what a weight of 1 should lose, a ten-thousandth per step, that it has lost after all steps."""
    weight = nn.Parameter(torch.ones(256, 256, device=best_device(), dtype=torch.bfloat16))
    optimizer = make([{"params": [weight], "weight_decay": 0.0}], UPDATE)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return float((1 - weight.detach().double().mean()) / (steps * UPDATE))


def trained(make: Make, dtype: torch.dtype, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Weights (256, 256) after some steps with noisy gradients of changing size, and before."""
    random, device = torch.Generator().manual_seed(0), best_device()
    start = (torch.randn(256, 256, generator=random) * 0.02).bfloat16().float()
    weight = nn.Parameter(start.to(device, dtype, copy=True))
    optimizer = make([weight], RATE)
    direction = torch.randn(256, 256, generator=random)
    for step in range(steps):
        gradient = (0.3 * direction + torch.randn(256, 256, generator=random)) * 1e-3 * (1 + step % 3)
        weight.grad = gradient.to(device, dtype)
        optimizer.step()
    return weight.detach().float().cpu(), start


def _distance(found: Tensor, exact: Tensor, start: Tensor) -> float:
    """The distance of weights from the exact ones, relative to the distance that these have moved."""
    return float((found.float() - exact).norm() / (exact - start).norm())


def shapes(config: dict[str, Any]) -> list[tuple[int, ...]]:
    """Those of all weights of a Llama."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(config["vocab_size"], hidden), *layer * config["num_hidden_layers"], (hidden,), (2, hidden)]


def costs(make: Make, shapes: Iterable[tuple[int, ...]], steps: int = 5) -> Figures:
    """Time and memory of a step on weights of some shapes; memory is 0 on a CPU."""
    device = best_device()
    parameters = [nn.Parameter(torch.randn(s, device=device, dtype=torch.bfloat16) * 0.02) for s in shapes]
    count = sum(p.numel() for p in parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    before = _allocated()
    optimizer = make(parameters, RATE)
    begin = now()
    optimizer.step()
    first = now() - begin
    held = _allocated() - before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    begin = now()
    for _ in range(steps):
        optimizer.step()
    seconds = (now() - begin) / steps
    return {
        "parameters": count,
        "first_step_seconds": first,
        "milliseconds": seconds * 1e3,
        "processor_milliseconds": _processor_seconds(optimizer) * 1e3,
        "state_bytes_a_parameter": held / count,
        "more_bytes_in_a_step": (torch.cuda.max_memory_allocated() - before - held) / count if held else 0.0,
    }


def _processor_seconds(optimizer: torch.optim.Optimizer) -> float:
    """How long the CPU takes to start a step. The device is idle, so it waits for nothing."""
    begin = now()
    optimizer.step()
    seconds = time.perf_counter() - begin
    now()
    return seconds


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    print(json.dumps(auto_cli(optimizer_figures, as_positional=False)))
