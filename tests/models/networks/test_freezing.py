"""Frozen layers: what is frozen in each family, what no gradient reaches, and options that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from datamodules.errors import UserError
from models.learning.reward_classifier import RewardClassifier
from models.networks.freezing import freeze_lowest, lowest_frozen
from models.networks.operations import Operations
from models.networks.sharding import blocks
from tests.models.networks.test_heads import build
from tests.models.small import FAMILIES, fit, small_classifier, small_data


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_lowest_layers_are_frozen_and_no_gradient_reaches_them(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    network = build(family, tokenizer, dropout=0.0)
    assert lowest_frozen(network) == []
    freeze_lowest(network, 1)
    lower, upper = blocks(network.base_model)
    assert lowest_frozen(network) == [lower]
    assert all(parameter.requires_grad for parameter in upper.parameters())
    inputs = []
    upper.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    network(torch.tensor([[7, 8, 9]])).logits.sum().backward()
    assert not inputs[0].requires_grad
    with_gradient = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    embeddings = {name for name, _ in network.named_parameters() if "word_embeddings" in name or "embed_t" in name}
    assert with_gradient
    assert not with_gradient & embeddings


def test_more_layers_than_there_are_cannot_be_frozen(tokenizer: PreTrainedTokenizerFast) -> None:
    network = build("llama", tokenizer)
    freeze_lowest(network, 2)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["model.norm.weight", "score.weight"]
    with pytest.raises(UserError, match=r"freeze_layers: 3, but LlamaForSequenceClassification has 2 layers"):
        freeze_lowest(network, 3)


def test_frozen_layers_cost_their_forward_pass(tokenizer: PreTrainedTokenizerFast) -> None:
    network = build("llama", tokenizer)
    whole = Operations.of(network)
    layer = sum(parameter.numel() for parameter in blocks(network)[0].parameters())
    freeze_lowest(network, 1)
    frozen = Operations.of(network)
    assert whole.token - frozen.token == 4 * layer
    assert frozen.pair == whole.pair * 2 / 3  # 4 + 12 of 24


def test_training_changes_only_the_upper_layers(base: Path, root: Path) -> None:
    from safetensors.torch import load_file

    classifier = RewardClassifier(backbone=str(base), freeze_layers=1, learning_rate=1e-2)
    fit(classifier, small_data(root, tokenizer=str(base)), max_steps=2)
    before = load_file(base / "model.safetensors")
    assert classifier.network is not None
    changed = {name for name, weight in classifier.network.state_dict().items() if not equal(weight, before.get(name))}
    layers = {name.split(".")[2] for name in changed if name.startswith("model.layers.")}
    assert layers == {"1"}
    assert changed >= {"model.norm.weight", "score.weight"}
    assert "model.embed_tokens.weight" not in changed


def equal(weight: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(weight, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "the layers of a backbone from scratch are random"),
        ({"adapter": {"rank": 2}}, "with model.adapter all layers are frozen already"),
    ],
)
def test_frozen_layers_that_do_not_fit_other_options_are_refused(
    options: dict[str, Any], words: str, root: Path
) -> None:
    with pytest.raises(UserError, match=words):
        fit(small_classifier(freeze_layers=1, **options), small_data(root), max_steps=1)
