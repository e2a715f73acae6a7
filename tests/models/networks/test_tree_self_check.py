"""The self-check of trees: it detects backbones that read trees in another way than rows."""

import logging
from typing import Any

import pytest
import torch

from datamodules.batching.reward_rows import RewardDataModule
from datamodules.errors import UserError
from models.learning.reward_classifier import RewardClassifier
from models.networks.self_checks import attention_window
from models.networks.tree_reading import tree_problem
from tests.helpers import SMALL_BACKBONE
from tests.models.networks.test_tree_reading import network
from tests.models.small import small_trainer


@pytest.mark.parametrize(
    ("family", "settings_", "reason"),
    [
        ("bert", {}, "depend on what follows"),
        ("mistral", {"sliding_window": 100}, "attend to the last 100 tokens, and rows have up to 101"),
        ("gemma3_text", {"sliding_window": 64}, "attend to the last 64 tokens"),
        ("bloom", {}, "it refuses them"),
        ("qwen3_next", {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "num_experts": 2}, "it refuses them"),
    ],
)
def test_backbones_that_cannot_read_trees_are_detected(family: str, settings_: dict[str, Any], reason: str) -> None:
    assert reason in str(tree_problem(network(family, **settings_), longest=101))


def test_a_window_as_long_as_the_longest_row_is_no_problem() -> None:
    assert tree_problem(network("mistral", sliding_window=101), longest=101) is None
    assert attention_window(network("llama").config) is None


def test_a_backbone_that_ignores_the_mask_is_detected() -> None:
    """The self-check compares results: here branches see each other, which is wrong."""
    backbone = network("llama", "sdpa")
    inner = backbone.model.forward

    def forward(**inputs: Any) -> Any:
        tokens = inputs["input_ids"].shape[1]
        return inner(**{**inputs, "attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()})

    backbone.model.forward = forward
    assert "depends on the other rows" in str(tree_problem(backbone, longest=64))


def test_a_backbone_that_ignores_the_positions_is_detected() -> None:
    backbone = network("gpt2")
    inner = backbone.transformer.forward

    def forward(**inputs: Any) -> Any:
        return inner(**{**inputs, "position_ids": None})

    backbone.transformer.forward = forward
    assert "gives other states" in str(tree_problem(backbone, longest=64))


def test_an_attention_without_custom_masks_is_named() -> None:
    backbone = network("llama")
    backbone.config._attn_implementation = "flash_attention_2"
    assert tree_problem(backbone, longest=64) == "attention flash_attention_2 accepts no custom mask"


def fit_one_step(layout: str, **options: Any) -> RewardDataModule:
    data = RewardDataModule(layout=layout, vocabulary_size=300, folds=8)
    trainer = small_trainer(max_steps=1, limit_val_batches=0, num_sanity_val_steps=0)
    trainer.fit(RewardClassifier(**options), data)
    return data


def test_auto_falls_back_to_rows_and_logs_the_reason_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder["max_position_embeddings"] = 1024
    monkeypatch.setattr(logging.getLogger("proactive"), "propagate", True)
    with caplog.at_level(logging.INFO, "proactive"):
        assert fit_one_step("auto", scratch=encoder).layout == "rows"
    assert sum("data.layout: rows" in message for message in caplog.messages) == 1
    with pytest.raises(UserError, match=r"data\.layout: tree is not possible"):
        fit_one_step("tree", scratch=encoder)


def test_auto_is_tree_for_a_decoder() -> None:
    assert fit_one_step("auto", scratch=SMALL_BACKBONE).layout == "tree"
    assert fit_one_step("auto", scratch=SMALL_BACKBONE, pooling="mean").layout == "rows"
