"""AdamW8bit converges like AdamW, loses no small update, and its state can be saved and sharded without loss."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from datamodules.errors import UserError
from models.learning import adamw_8bit
from models.learning.adamw_8bit import BLOCK, AdamW8bit, _join, _random_bits, _split, _update, layout
from models.learning.optimizers import build_optimizer, clip

PLACE = torch.tensor(7, dtype=torch.int32)
DTYPES = (torch.float32, torch.bfloat16)


def master(optimizer: AdamW8bit, weight: Tensor) -> Tensor:
    """The weight with all bits that the optimizer stores, float64."""
    whole = weight.detach()
    if "remainder" in optimizer.state[weight]:
        whole = _join(whole.reshape(1, -1), optimizer.state[weight]["remainder"].reshape(1, -1)).view(weight.shape)
    return whole.double()


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    """A matrix with blocks, a matrix without, and a vector."""
    torch.manual_seed(0)
    shapes = ((32, 3 * BLOCK), (6, 10), (100,))
    return [nn.Parameter(torch.randn(shape).mul(0.02).to(dtype)) for shape in shapes]


def gradients_of(step: int, some: list[nn.Parameter]) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [(torch.randn(p.shape, generator=random) * 1e-5 + 2e-6).to(p.dtype) for p in some]


def take(optimizer: torch.optim.Optimizer, some: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for weight, gradient in zip(some, gradients_of(step, some), strict=True):
            weight.grad = gradient
        optimizer.step()


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1))
def test_a_float_is_split_into_bfloat16_and_eight_bits_more(values: list[float]) -> None:
    value = torch.tensor([values])
    upper, remainder = _split(value, _random_bits(value.shape, PLACE))
    joined = _join(upper, remainder)
    assert bool(((joined - value).abs() <= value.abs() * 2**-15).all())
    assert bool(((upper.float() - joined).abs() <= joined.abs() * 2**-8).all())


def test_stochastic_rounding_is_right_on_average() -> None:
    value = torch.full((1, 2**16), 0.7654321)
    joined = _join(*_split(value, _random_bits(value.shape, PLACE)))
    assert len(joined.unique()) == 2
    # Off by at most 2^-16 each, so the mean's standard error is below 6e-8.
    assert float(joined.double().mean()) == pytest.approx(0.7654321, abs=3e-7)


def test_random_bits_depend_only_on_the_index_and_are_uniform() -> None:
    bits = _random_bits(torch.Size((1024, BLOCK)), PLACE)
    assert torch.equal(_random_bits(torch.Size((512, BLOCK)), PLACE + 512 * BLOCK), bits[512:])
    for bit in range(24):
        assert float(((bits >> bit) & 1).float().mean()) == pytest.approx(0.5, abs=0.01)
    low, high = (bits & 0xFF).float().flatten(), ((bits >> 8) & 0xFFFF).float().flatten()
    for one, other in ((low, high), (low[1:], low[:-1])):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.02


@pytest.mark.parametrize("update", [1e-4, 1e-5, 1e-6])
def test_small_updates_of_bfloat16_weights_are_not_lost(update: float) -> None:
    """Rounding to bfloat16, whose steps below 1 are 1/256, would lose them."""
    steps, means = 20, {}
    for name in ("adamw", "adamw_8bit"):
        weight = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
        optimizer = build_optimizer([weight], name, update, weight_decay=0.0)  # type: ignore[arg-type]
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        means[name] = float((master(optimizer, weight) if isinstance(optimizer, AdamW8bit) else weight.double()).mean())
    assert means["adamw"] == 1.0
    # 65,536 weights, each off by up to 2^-16 a step: the mean's standard error is below 2e-7.
    assert 1 - means["adamw_8bit"] == pytest.approx(steps * update, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_8bit_converges_like_adamw(dtype: torch.dtype) -> None:
    """Over 200 steps with gradients as small as in a large model with a norm clipped to 1."""
    found, expected = weights(dtype), [nn.Parameter(p.detach().float()) for p in weights(dtype)]
    begin = [p.detach().double() for p in expected]
    optimizer = AdamW8bit(found, lr=1e-5, weight_decay=0.1)
    exact = torch.optim.AdamW(expected, lr=1e-5, weight_decay=0.1)
    take(optimizer, found, range(200))
    for step in range(200):
        for weight, gradient in zip(expected, gradients_of(step, found), strict=True):
            weight.grad = gradient.float()
        exact.step()
    for weight, other, start in zip(found, expected, begin, strict=True):
        moved, wanted = master(optimizer, weight) - start, other.detach().double() - start
        assert float((moved - wanted).norm() / wanted.norm()) < 0.03
        assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.003)


def test_a_small_moment_beside_a_large_one_is_not_lost() -> None:
    """One gradient of a block is 1,000 times the others. Each weight still moves by its learning rate per step."""
    weight = nn.Parameter(torch.zeros(1, BLOCK))
    optimizer = AdamW8bit([weight], lr=1e-3)
    for _ in range(10):
        weight.grad = torch.full_like(weight, 1e-5)
        weight.grad[0, 0] = 1e-2
        optimizer.step()
    assert float(weight[0, 0]) == pytest.approx(-1e-2, rel=0.02)
    assert float(weight[0, 1:].mean()) == pytest.approx(-1e-2, rel=0.3)
    assert bool((weight[0, 1:] < -3e-3).all())
    assert bool((weight[0, 1:] > -3e-2).all())


def test_a_second_moment_decays_although_steps_are_smaller_than_a_code() -> None:
    """The gradient of one of two neighbours falls to a hundredth. Its moment follows within a few hundred steps."""
    weight = nn.Parameter(torch.zeros(64, BLOCK))
    exact = torch.optim.AdamW([other := nn.Parameter(torch.zeros(64, BLOCK))], lr=0.0, weight_decay=0.0)
    optimizer = AdamW8bit([weight], lr=0.0)
    for step in range(600):
        gradient = torch.ones(64, BLOCK)
        gradient[:, 1] = 1.0 if step < 100 else 0.01
        weight.grad, other.grad = gradient, gradient.clone()
        optimizer.step()
        exact.step()
    state = optimizer.state[weight]
    root = (state["exp_avg_sq"].double() / 255) ** 2 * state["exp_avg_sq_scale"].double()
    found = float(root[:, 1].square().mean())
    assert found == pytest.approx(float(exact.state[other]["exp_avg_sq"][:, 1].mean()), rel=0.05)


def test_adamw_8bit_takes_seven_bytes_per_parameter_with_the_gradient() -> None:
    weight = nn.Parameter(torch.zeros(256, 512, dtype=torch.bfloat16))
    kept = sum(shape.numel() * dtype.itemsize for shape, dtype in layout(weight).values())
    assert kept / weight.numel() == 1 + 2 + 2 * 4 / BLOCK
    optimizer = AdamW8bit([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    assert sum(value.numel() * value.element_size() for value in state.values()) == kept
    assert (kept + weight.element_size() * weight.numel() * 2) / weight.numel() < 7.2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loaded_state_continues_bit_identically(dtype: torch.dtype) -> None:
    whole, parts = weights(dtype), weights(dtype)
    take(AdamW8bit(whole, lr=1e-3), whole, range(6))
    first = AdamW8bit(parts, lr=1e-3)
    take(first, parts, range(3))
    kept = copy.deepcopy(first.state_dict())
    second = AdamW8bit(parts, lr=1e-3)
    second.load_state_dict(kept)
    assert {v.dtype for v in second.state[parts[0]].values()} == {d for _, d in layout(parts[0]).values()}
    take(second, parts, range(3, 6))
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_the_state_of_another_optimizer_is_refused() -> None:
    some = weights(torch.float32)
    other = torch.optim.AdamW(some)
    take(other, some, range(1))
    with pytest.raises(UserError, match="another optimizer"):
        AdamW8bit(some).load_state_dict(other.state_dict())


@pytest.mark.parametrize("greatest", [1e-4, 10.0])
def test_clipping_equals_pytorchs(greatest: float) -> None:
    found, expected = weights(torch.float32), weights(torch.float32)
    ours, theirs = (AdamW8bit(some, lr=1e-3) for some in (found, expected))
    for step in range(3):
        for some in (found, expected):
            for weight, gradient in zip(some, gradients_of(step, some), strict=True):
                weight.grad = gradient
        norm = nn.utils.get_total_norm([p.grad for p in found if p.grad is not None])
        clip(ours, found, greatest, norm)
        nn.utils.clip_grads_with_norm_(expected, greatest, norm)
        ours.step()
        theirs.step()
        assert ours.gradient_scale is None
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_is_one_graph_for_weights_of_every_size(dtype: torch.dtype) -> None:
    """Compiled as on a GPU: equal up to rounding, without graph breaks, and compiled once for all matrices."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(_update, dynamic=True, fullgraph=True, backend=backend)
    shapes = [(8, BLOCK), (20, 3 * BLOCK), (64, 2 * BLOCK)]
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for update in (_update, compiled):
            patch.setattr(adamw_8bit, "_update", update)
            torch.manual_seed(0)
            some = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
            take(AdamW8bit(some, lr=1e-2), some, range(3))
            results.append(some)
    assert len(graphs) == 1
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_step_copies_nothing_from_the_device() -> None:
    """On a GPU, reading a value waits for all kernels before it."""
    some = weights(torch.bfloat16)
    optimizer = AdamW8bit(some, lr=1e-3)
    take(optimizer, some, range(1))
    with torch.profiler.profile() as profile:
        take(optimizer, some, range(1, 3))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert "aten::_local_scalar_dense" not in counts
    assert "aten::mul" in counts
