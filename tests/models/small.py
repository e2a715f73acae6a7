"""What the tests of models and callbacks share: small backbones, small data and a trainer that keeps quiet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.checkpoint_io import SafeCheckpointIO
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.steps import RewardBatch
from models.learning.reward_classifier import RewardClassifier

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
VOCABULARY = 61
EVERY_FAMILY: dict[str, Any] = {  # sizes that the configuration of each family of decoders takes
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "num_labels": 2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 1},
    "qwen2": {**SIZES, "num_key_value_heads": 1},
    "mistral": {**SIZES, "num_key_value_heads": 1},
    "gemma3_text": {**SIZES, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "gpt_neox": SIZES,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 512},
    "deberta-v2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": SIZES,
}
FAMILIES = DECODERS | ENCODERS
SMALL_LLAMA = {"model_type": "llama", **DECODERS["llama"]}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TRAIN_ROWS_A_STEP = 8


def small_classifier(family: str = "llama", **options: Any) -> RewardClassifier:
    """A classifier from scratch without dropout, so that equal computations give equal numbers."""
    scratch = {"model_type": family, **FAMILIES[family]}
    return RewardClassifier(**{"scratch": scratch, "dropout": 0.0, "learning_rate": 1e-2, **options})


def small_data(root: Path, **options: Any) -> RewardDataModule:
    """Six steps of eight rows, four micro-batches a step; the last step of an epoch is short."""
    defaults: dict[str, Any] = {
        "root": str(root),
        "folds": 3,
        "vocabulary_size": 400,
        "max_length": 160,
        "batch_size": TRAIN_ROWS_A_STEP,
        "layout": "rows",
        "micro_batch_size": 2,
        "scenes_per_step": None,
        "cache": False,
    }
    return RewardDataModule(**defaults | options)


def small_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """A CPU trainer as `fit` makes it, without its loggers."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "callbacks": list(callbacks),
        "plugins": [SafeCheckpointIO(RewardClassifier)],
        "use_distributed_sampler": False,
        "enable_checkpointing": any(hasattr(callback, "path") for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**defaults | options)


def fit(classifier: RewardClassifier, data: RewardDataModule, *callbacks: Callback, **options: Any) -> Trainer:
    """Train from the same random state each time."""
    torch.manual_seed(0)
    trainer = small_trainer(*callbacks, **options)
    trainer.fit(classifier, data, weights_only=True)
    return trainer


def probabilities(classifier: RewardClassifier, batch: RewardBatch) -> Tensor:
    """P(accepted) of a batch's rows, with dropout off."""
    classifier.eval()
    with torch.no_grad():
        return classifier(batch["inputs"]).double().softmax(-1)[:, 1]


def all_finite(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether no weight is infinite or not a number."""
    return all(bool(torch.isfinite(weight).all()) for weight in state_dict.values())
