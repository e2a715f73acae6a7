"""The paper's recipe on one GPU: an 8B Llama from random weights, every parameter trained, on the real rows.

    python benchmarks/gpu_recipe.py --root DIR

Weights, gradients and compute are bfloat16, the optimizer is 8-bit Adam with stochastic rounding (torchao), the rows
are prefix trees read with FlexAttention. Prints one JSON object: seconds a step and for the recipe of 5 epochs over
all training rows, tokens a second, the share of the card's own bfloat16 matrix rate that the tokens' operations
make (utilization), peak memory. `--epochs 0.2` measures a part and says so; `--small` tries the script on a CPU.
"""

import json
import time
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoints import SeedEachStep
from datamodules.batches import RewardBatch
from datamodules.reward import RewardDataModule
from datamodules.sources import load_corpus
from models.reward import RewardClassifier

LLAMA_3_1_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
SMALL = LLAMA_3_1_8B | {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
EPOCHS = 5  # of the paper's recipe
WARM_UP_STEPS = 5  # compile, and find their memory


class Meter(Callback):
    """Time, tokens and operations of every step after the warm-up."""

    def __init__(self) -> None:
        self.steps = self.tokens = self.operations = 0
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        _wait()
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: list[RewardBatch], batch_idx: int
    ) -> None:
        _wait()
        if trainer.global_step <= WARM_UP_STEPS:
            return
        self.seconds += time.perf_counter() - self._begin
        self.steps += 1
        for micro_batch in batch:
            inputs = micro_batch["inputs"]
            tokens = inputs["input_ids"].numel()
            # Each token attends to those before it in its row: as many pairs as positions, plus itself.
            pairs = int((inputs["position_ids"] + 1).sum())
            self.tokens += tokens
            self.operations += operations(pl_module.network, tokens, pairs)


def operations(network: Any, tokens: int, pairs: int) -> int:
    """Of a forward and a backward pass: 6 a weight of the layers and token, 12 D a layer and attended pair.

    Without what activation checkpointing computes again: that is not work that the model takes.
    """
    config = network.config
    weights = sum(p.numel() for p in network.base_model.layers.parameters())
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    return 6 * weights * tokens + 12 * config.num_hidden_layers * width * pairs


def matrix_rate(device: torch.device, size: int) -> float:
    """Operations a second of a bfloat16 matrix product on this device, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait()
        begin = time.perf_counter()
        a @ b
        _wait()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def main(
    root: str,
    epochs: float = EPOCHS,
    scenes_per_step: int = 4,
    token_budget: int = 4096,
    gradient_checkpointing: bool = False,
    validation_fraction: float = 0.005,
    small: bool = False,
) -> None:
    """Run the recipe, or a part of it.

    Args:
        root: A directory in the published layout.
        epochs: How much of the recipe to run; the rest is reckoned from the steps measured.
        scenes_per_step: From how many scenes a step of 32 rows takes them.
        token_budget: Tokens computed at once, at most.
        gradient_checkpointing: Keep no activations inside a layer.
        validation_fraction: The share of training rows that is not trained on; as small as can be.
        small: A backbone of 2 small layers, float32 Adam.
    """
    torch.set_float32_matmul_precision("high")
    data = RewardDataModule(
        root=root,
        split="published",
        validation_fraction=validation_fraction,
        layout="tree",
        scenes_per_step=scenes_per_step,
        token_budget=token_budget,
    )
    model = RewardClassifier(
        scratch=SMALL if small else LLAMA_3_1_8B,
        dtype="float32" if small else "bfloat16",
        optimizer="adamw" if small else "adamw_8bit_stochastic_rounding",
        learning_rate=1e-5,
        weight_decay=0.0,
        gradient_checkpointing=gradient_checkpointing,
    )
    rows = len(load_corpus(root).train)
    steps_an_epoch = -(-rows // data.batch_size)
    meter = Meter()
    trainer = Trainer(
        max_steps=max(round(epochs * steps_an_epoch), WARM_UP_STEPS + 1),
        devices=1,
        precision="32-true" if small else "bf16-true",
        callbacks=[SeedEachStep(), meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    device = model.device
    rate = matrix_rate(device, 256 if small else 8192)
    seconds = meter.seconds / meter.steps
    whole = epochs >= EPOCHS
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.network.config._attn_implementation if model.network else None,
        "scenes_per_step": scenes_per_step,
        "token_budget": token_budget,
        "gradient_checkpointing": gradient_checkpointing,
        "steps_measured": meter.steps,
        "seconds_per_step": seconds,
        "recipe_seconds": seconds * EPOCHS * steps_an_epoch,
        "recipe_seconds_are": "measured, warm-up steps at the mean" if whole else "measured steps times count",
        "tokens_per_step": meter.tokens / meter.steps,
        "tokens_per_second": meter.tokens / meter.seconds,
        "bf16_matrix_rate_tflops": rate / 1e12,
        "utilization": meter.operations / meter.seconds / rate,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "last_loss": float(trainer.callback_metrics["train/loss"]),
    }
    print(json.dumps(found, indent=2))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
