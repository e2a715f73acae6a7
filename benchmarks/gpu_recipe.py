"""The paper's recipe on one GPU: an 8B Llama from random weights, every parameter trained, on the real rows.

    python benchmarks/gpu_recipe.py --root DIR                                as configs/reward/full_1x80gb.yaml
    python benchmarks/gpu_recipe.py --root DIR --how qlora --steps 20         as configs/reward/qlora.yaml
    python benchmarks/gpu_recipe.py --root DIR --how fsdp2 --steps 20         the full recipe by FSDP2, on one device

In the full recipe weights, gradients and compute are bfloat16 and the optimizer is 8-bit Adam with stochastic rounding
(torchao); in QLoRA the weights are in 4 bits and adapters are trained. The rows are prefix trees read with
FlexAttention. Prints one JSON object: seconds a step and for the recipe of 5 epochs over all training rows, tokens a
second, the share of the card's own bfloat16 matrix rate that the tokens' operations make (utilization), peak memory,
and what `python -m proactive.plan` would have said of it. `--epochs 0.2` or `--steps 20` measure a part and say so;
`--small` tries the script on a CPU.
"""

import json
import time
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from callbacks.checkpoints import SeedEachStep
from datamodules.batches import RewardBatch
from datamodules.reward import RewardDataModule
from datamodules.sources import load_corpus
from models.adapters import AdapterOptions
from models.memory import MemoryPlan, Setting
from models.operations import Operations, batch_size, weight_count
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
        self.accumulates = False  # whether a step had several micro-batches
        self.largest: dict[str, Any] = {}  # the micro-batch with the most tokens

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
        counts = Operations.of(pl_module.network)
        self.accumulates |= len(batch) > 1
        for micro_batch in batch:
            size = batch_size(micro_batch)
            self.tokens += size.tokens
            self.operations += counts.count(size.real_tokens, size.pairs)
            if not self.largest or size.tokens > self.largest["inputs"]["input_ids"].numel():
                self.largest = micro_batch  # type: ignore[assignment]


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
    how: Literal["full", "qlora", "fsdp2"] = "full",
    steps: int | None = None,
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
        how: All weights, adapters on 4-bit weights, or all weights by FSDP2.
        steps: How many steps to measure, in place of epochs.
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
    qlora = how == "qlora"
    options: dict[str, Any] = {
        "scratch": SMALL if small else LLAMA_3_1_8B,
        "dtype": "float32" if small else "bfloat16",
        "optimizer": "adamw" if small or qlora else "adamw_8bit_stochastic_rounding",
        "learning_rate": 1e-4 if qlora else 1e-5,
        "weight_decay": 0.0,
        "gradient_checkpointing": gradient_checkpointing,
        "adapter": AdapterOptions() if qlora else None,
        "quantization": "nf4" if qlora else "none",
    }
    precision = "32-true" if small else "bf16-mixed" if qlora else "bf16-true"
    model = RewardClassifier(**options)
    rows = len(load_corpus(root).train)
    steps_an_epoch = -(-rows // data.batch_size)
    meter = Meter()
    trainer = Trainer(
        max_steps=steps + WARM_UP_STEPS if steps else max(round(epochs * steps_an_epoch), WARM_UP_STEPS + 1),
        devices=1,
        strategy=ModelParallelStrategy() if how == "fsdp2" else "auto",
        precision=precision,  # type: ignore[arg-type]
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
    whole = steps is None and epochs >= EPOCHS
    assert model.network is not None
    setting = Setting(
        dtype=options["dtype"],
        precision=precision,
        optimizer=options["optimizer"],
        checkpointing=gradient_checkpointing,
        adapter=options["adapter"],
        quantization=options["quantization"],
        accumulates=meter.accumulates,
    )
    planned = MemoryPlan(RewardClassifier(**options), model.network.config, meter.largest).memory(setting)
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "how": how,
        "parameters": weight_count(model),
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
        "planned_memory_gib": planned.peak / 2**30,
        "last_loss": float(trainer.callback_metrics["train/loss"]),
    }
    print(json.dumps(found, indent=2))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
