"""Branches in steps of fixed shapes give the tokens that growing ones give; no graph is recorded without a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.decoding import fixed_branches
from models.decoding.fixed_branches import FixedBranchReader
from tests.models.decoding.test_generation import (
    DRAWN,
    FAMILIES,
    followed,
    generated,
    llama,  # noqa: F401 - fixtures
    network,
    uneven,  # noqa: F401
    uneven_traces,
    without_end,  # noqa: F401
)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From now on, branches are read in steps of fixed shapes."""

    def begin() -> None:
        monkeypatch.setattr("models.decoding.generation._reader", FixedBranchReader)

    return begin


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_answers_with_fixed_shapes(family: str, fixed: Any) -> None:
    model, traces = network(family), uneven_traces()
    expected = generated(model, traces, branched=True)
    fixed()
    for batch_size in (1, 5):
        assert generated(model, traces, batch_size=batch_size, branched=True) == expected


@pytest.mark.parametrize(("ahead", "waste"), [(64, 0.5), (5, 0.5), (1, 0.0), (7, 1.0)])
def test_answers_are_the_same_when_capacity_ends_and_branches_finish(
    llama: PreTrainedModel,  # noqa: F811
    uneven: Any,  # noqa: F811
    ahead: int,
    waste: float,
    fixed: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fixed_branches, "STEPS_AHEAD", ahead)
    monkeypatch.setattr(fixed_branches, "CAPACITY_MULTIPLE", 8)
    monkeypatch.setattr(fixed_branches, "MIN_USED", waste)
    end_id, expected = uneven
    fixed()
    for batch_size in (1, 2, 5):
        options: dict[str, Any] = {"end_id": end_id, "max_new_tokens": 24, "batch_size": batch_size}
        assert generated(llama, uneven_traces(), **options, branched=True) == expected


@pytest.mark.parametrize("options", [{}, DRAWN, {"max_length": 31}])
def test_a_growing_history_gets_the_same_answers(
    llama: PreTrainedModel,  # noqa: F811
    options: dict[str, Any],
    fixed: Any,
) -> None:
    expected = generated(llama, uneven_traces(), **options)
    fixed()
    assert followed(llama, uneven_traces(), **options) == expected


def test_branches_are_forked_into_candidates(llama: PreTrainedModel, fixed: Any) -> None:  # noqa: F811
    expected = generated(llama, uneven_traces(), **DRAWN)
    fixed()
    assert generated(llama, uneven_traces(), **DRAWN) == expected


def test_shapes_and_addresses_are_fixed_until_capacity_ends(llama: PreTrainedModel) -> None:  # noqa: F811
    reader, seen = FixedBranchReader(llama), []
    handle = llama.register_forward_pre_hook(
        lambda module, arguments, inputs: seen.append([inputs[name] for name in ("input_ids", "position_ids")]),
        with_kwargs=True,
    )
    reader.begin([[1, 2, 3, 4], [5, 6, 7]], [[2, 4], [3]], [8])
    rows = reader.branch([[0, 1], [0]])
    for number in range(10):
        reader.read([[number, 1 + number], [2 + number]])
        rows = reader.branch([[0, 1], [0]])
    handle.remove()
    assert rows == [0, 1]
    steps = seen[1:]
    assert {tuple(tensor.shape for tensor in step) for step in steps} == {((2, 2), (2, 2))}
    assert {tuple(tensor.data_ptr() for tensor in step) for step in steps} == {
        tuple(tensor.data_ptr() for tensor in steps[0])
    }
    assert len({layer.keys.data_ptr() for layer in reader.cache.layers}) == len(reader.cache.layers)
    assert reader.cache.layers[0].keys.shape[2] % fixed_branches.CAPACITY_MULTIPLE == 0


def test_a_network_that_cannot_be_captured_decodes_without_a_graph(
    llama: PreTrainedModel,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refuses:
        def __init__(self, *arguments: Any, **options: Any) -> None: ...

        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *arguments: Any) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refuses)
    monkeypatch.setattr(torch.cuda, "graph", Refuses)
    readers = [FixedBranchReader(llama), FixedBranchReader(llama)]
    readers[0].uses_graph = True
    found: list[list[Tensor]] = []
    for reader in readers:
        reader.begin([[1, 2, 3, 4]], [[2, 4]], [8])
        reader.branch([[0, 1]])
        found.append([reader.read([[token, token]]) for token in range(5)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert readers[0].uses_graph is False


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])  # heads in groups, or each with keys of its own
def test_grouped_attention_gives_what_sdpa_gives(family: str) -> None:
    from models.networks.attention import GROUPED, register

    model = network(family)
    expected = generated(model, uneven_traces(), branched=True)
    register()
    model.set_attn_implementation(GROUPED)
    assert generated(model, uneven_traces(), branched=True) == expected
    assert model.config._attn_implementation == GROUPED


def test_a_network_that_reads_trees_with_flex_attention_branches_with_another() -> None:
    model = network("llama")
    expected = generated(model, uneven_traces(), branched=True)
    model.set_attn_implementation("flex_attention")
    assert generated(model, uneven_traces(), branched=True) == expected
    assert model.config._attn_implementation == "flex_attention"
