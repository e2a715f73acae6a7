"""Optimizers lower a loss on this machine, do not decay vectors, and follow their schedules."""

import math
import sys
from typing import get_args

import pytest
import torch
from torch import nn

from datamodules.errors import UserError
from models.learning.adamw_8bit import AdamW8bit
from models.learning.optimizers import OptimizerName, ScheduleName, build_optimizer, build_schedule, lost_updates

NAMES = get_args(OptimizerName)
SCHEDULES = get_args(ScheduleName)


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_lowers_a_loss(name: OptimizerName) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)  # 4,096 weights: from here on bitsandbytes keeps its state in 8 bits
    inputs, wanted = torch.randn(32, 64), torch.randn(32, 64)
    optimizer = build_optimizer(layer.parameters(), name, 1e-2, 0.0)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(inputs), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)


def test_names_give_their_optimizers() -> None:
    import bitsandbytes

    layer = nn.Linear(64, 64)
    fused = build_optimizer(layer.parameters(), "adamw", 1e-2, 0.0)
    assert type(fused) is torch.optim.AdamW
    assert fused.defaults["fused"]
    assert type(build_optimizer(layer.parameters(), "adamw_8bit", 1e-2, 0.0)) is AdamW8bit
    paged = build_optimizer(layer.parameters(), "paged_adamw_8bit", 1e-2, 0.0)
    assert type(paged) is bitsandbytes.optim.PagedAdamW8bit
    assert paged.is_paged
    layer(torch.ones(1, 64)).sum().backward()
    paged.step()
    assert paged.state[layer.weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_vectors_do_not(name: OptimizerName) -> None:
    """With zero gradients a step only applies decoupled decay."""
    layer = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    nn.init.ones_(layer[0].weight)
    nn.init.ones_(layer[0].bias)
    optimizer = build_optimizer(layer.parameters(), name, 0.1, 0.5)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer[0].weight, torch.full((64, 64), 1 - 0.1 * 0.5))
    assert (layer[0].bias == 1).all()
    assert (layer[1].weight == 1).all()


def test_adamw_without_decay_is_adam() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    steps = build_optimizer(ours.parameters(), "adamw", 1e-2, 0.0), torch.optim.Adam(theirs.parameters(), 1e-2)
    for _ in range(5):
        for layer, optimizer in zip((ours, theirs), steps, strict=True):
            optimizer.zero_grad()
            layer(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("name", NAMES)
def test_only_trained_parameters_are_optimized(name: OptimizerName) -> None:
    layer = nn.Linear(64, 64)
    layer.weight.requires_grad_(False)
    optimizer = build_optimizer(layer.parameters(), name, 0.1, 0.0)
    assert [p for group in optimizer.param_groups for p in group["params"]] == [layer.bias]


def test_bitsandbytes_that_does_not_load_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # a machine without its native library
    with pytest.raises(UserError, match="bitsandbytes does not load") as error:
        build_optimizer(nn.Linear(2, 2).parameters(), "paged_adamw_8bit", 0.1, 0.0)
    assert "adamw" in error.value.hint


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("warmup_ratio", "steps"), [(0.1, 40), (0.0, 7), (0.5, 9)])
def test_the_rate_rises_to_its_peak_and_falls_to_zero(name: ScheduleName, warmup_ratio: float, steps: int) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2).parameters(), "adamw", 0.25, 0.0)
    schedule = build_schedule(optimizer, name, warmup_ratio, steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    warm = round(warmup_ratio * steps)
    for step, rate in enumerate(rates):
        if step < warm:
            expected = 0.25 * step / warm
        else:
            left = 1 - (step - warm) / (steps - warm)
            expected = 0.25 * (left if name == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))
        assert rate == pytest.approx(expected, abs=1e-12), step
    assert max(rates) == 0.25
    assert rates[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("learning_rate", [1e-5, 1e-4, 1e-2])
def test_lost_updates_equals_the_share_of_weights_that_a_step_does_not_change(
    dtype: torch.dtype, learning_rate: float
) -> None:
    """Adam's first step moves each weight by the learning rate."""
    torch.manual_seed(0)
    weight = nn.Parameter((torch.randn(4000, 3) * 0.02).to(dtype))
    frozen = nn.Parameter(torch.ones(10**5, dtype=dtype), requires_grad=False)
    expected = lost_updates([weight, frozen], "adamw", learning_rate)
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=learning_rate, weight_decay=0.0)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    stayed = float((weight.detach() == before).float().mean())
    assert expected == pytest.approx(stayed, abs=0.02)
    assert (expected > 0.5) == (dtype == torch.bfloat16 and learning_rate == 1e-5)
    assert lost_updates([weight], "adamw_8bit", learning_rate) == 0.0
