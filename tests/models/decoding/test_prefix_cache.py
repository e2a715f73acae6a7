"""States that go on from a cache against those of whole rows, and each token read once."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from models.decoding.prefix_cache import PrefixCache, cache_problem
from models.networks.tree_reading import read_row
from tests.models.networks.test_tree_reading import FAMILIES, network
from tests.models.small import VOCABULARY

TOKENS = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=6)
# Rows that grow, are cut and begin anew, as histories do: each is some of the first tokens of the row before, and more.
GROWING = st.lists(st.tuples(st.integers(0, 12), st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return network("llama").eval()


def calls(steps: list[tuple[int, list[list[int]]]]) -> list[list[list[int]]]:
    rows, before = [], [1]
    for kept, tails in steps:
        rows.append([[*before[:kept], *tail] for tail in tails])
        before = rows[-1][0]
    return rows


def whole(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([read_row(model, row)[-1] for row in rows])


@settings(max_examples=40, deadline=None)
@given(GROWING)
def test_states_are_those_of_whole_rows(llama: PreTrainedModel, steps: Any) -> None:
    cache = PrefixCache(llama)
    for rows in calls(steps):
        torch.testing.assert_close(cache.states(rows), whole(llama, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_continues_from_a_cache(family: str) -> None:
    model = network(family)
    assert cache_problem(model, longest=300) is None
    assert model.training, "it is left as it was"
    model.eval()
    cache, history = PrefixCache(model), [5, 6, 7]
    for token in range(8, 14):
        history = [*history, token, token + 1]
        rows = [[*history, 30], [*history, 31, 32, 33], history]
        torch.testing.assert_close(cache.states(rows), whole(model, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attentions_with_masks_work_with_a_cache(attention: str) -> None:
    assert cache_problem(network("qwen3", attention), longest=64) is None


def test_cached_tokens_are_not_computed_again(llama: PreTrainedModel) -> None:
    read: list[int] = []
    handle = llama.base_model.register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    cache, history = PrefixCache(llama), list(range(1, 21))
    try:
        cache.states([[*history, 40, 41], [*history, 42]])
        cache.states([[*history, 22, 23, 40, 41], [*history, 22, 23, 42]])
        cache.states([[*history, 22, 23, 40, 41]])
        cache.states([[2, 3]])
    finally:
        handle.remove()
    assert read == [20 + 2 + 1, 2 + 2 + 1, 2, 2]


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "its layers attend to the last 8 tokens, and rows have up to 64"),
        ("bloom", {}, "it refuses a cache"),
    ],
)
def test_networks_that_cannot_continue_from_a_cache_are_detected(
    family: str, options: dict[str, Any], reason: str
) -> None:
    assert str(cache_problem(network(family, "sdpa" if family == "mistral" else "eager", **options), 64)).startswith(
        reason
    )


def test_a_network_that_ignores_mask_or_positions_is_detected_by_the_cache_check() -> None:
    for dropped in ("attention_mask", "position_ids"):
        model = network("gpt2")
        inner = model.transformer.forward

        def forward(*arguments: Any, inner: Any = inner, dropped: str = dropped, **inputs: Any) -> Any:
            return inner(*arguments, **{**inputs, dropped: None})

        model.transformer.forward = forward
        assert "a kept cache gives other states than whole rows" in str(cache_problem(model, longest=64))
