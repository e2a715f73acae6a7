"""The paper's recipe on one GPU: an 8B Llama with random weights, trained on the real rows.

    python benchmarks/gpu_recipe.py --root DIR                             as configs/reward/full_1x80gb.yaml
    python benchmarks/gpu_recipe.py --root DIR --how qlora --steps 20      as configs/reward/qlora.yaml
    python benchmarks/gpu_recipe.py --root DIR --how fsdp2 --steps 20      the full recipe by FSDP2, on one device

Model, data and precision are those of the config; only the backbone's weights are random ones of
benchmarks/shapes/llama_3_1_8b.yaml. Prints one JSON object: seconds a step and for the recipe of 5 epochs over all
training rows, tokens a second, the share of the card's own bfloat16 matrix rate that the tokens' operations make
(utilization), peak memory, what `python -m proactive.plan` would have said of it, and where the time of one more step
goes. `--epochs 0.2` or `--steps 20` measure a part and say so; `--small true` tries the script on a CPU.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import auto_cli
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch.profiler import ProfilerActivity, profile

from callbacks.fully_sharded import FullySharded
from callbacks.seeding import SeedEachStep
from callbacks.throughput import peak_memory
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.steps import BatchSize, batch_size
from models.learning.reward_classifier import RewardClassifier
from models.networks.adapters import AdapterOptions
from models.networks.operations import Operations, weight_count
from models.planning.memory import MemoryPlan, Setting

ROOT = Path(__file__).parents[1]
SHAPE = ROOT / "benchmarks" / "shapes" / "llama_3_1_8b.yaml"
How = Literal["full", "qlora", "fsdp2"]
CONFIGS: dict[How, str] = {"full": "full_1x80gb", "qlora": "qlora", "fsdp2": "full_1x80gb"}
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
EPOCHS = 5  # of the paper's recipe
WARM_UP_STEPS = 5  # compile, and find their memory
TOP = 12  # operations of a profile that are shown
QUICK = 2**20  # random numbers that large tensors repeat, see `quick_weights`


class Meter(Callback):
    """Times steps without waiting for the device between them; then one more is profiled.

    Batches are kept, for to count what is in them would wait for the device.
    """

    def __init__(self, steps: int, profiled: bool = True) -> None:
        self.last = WARM_UP_STEPS + steps
        self.steps = steps
        self.profiled = profiled
        self.batches: list[list[dict[str, Any]]] = []
        self.losses: list[torch.Tensor] = []
        self.profile: dict[str, Any] = {}
        self.first_step = self.seconds = 0.0
        self.compilations = 0  # within the steps that are timed
        self.memory: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._began = self._since = now()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._tell("the network is made and tried")
        self._since = now()

    def _tell(self, what: str) -> None:
        print(f"{what} after {now() - self._began:.1f} s", file=sys.stderr, flush=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.last and self.profiled:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profiler.start()
            self._since = now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.losses.append(trainer.callback_metrics["train/loss"].detach())
        step = trainer.global_step
        if step == 1:
            self.first_step = now() - self._since
            self._tell("the first step")
        elif step == WARM_UP_STEPS:
            self._tell("the warm-up")
            self._compiled = _compilations()
            self._since = now()
        elif step == self.last:
            self.seconds = now() - self._since
            self.compilations = _compilations() - self._compiled
            self.memory = _memory(trainer.strategy.root_device)
            self._tell("the timed steps")
            if trainer.is_global_zero:  # what follows may take longer than there is time
                print(json.dumps(self.figures()), flush=True)
        elif step > self.last:
            seconds = now() - self._since
            self._profiler.stop()
            self.profile = {"milliseconds": seconds * 1e3, **_where_time_goes(self._profiler)}

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget the optimizer, whose state the trainer would copy to the CPU, which takes longer than the steps."""
        trainer.strategy.optimizers = []

    def figures(self) -> dict[str, Any]:
        """What is known when the steps are timed."""
        total = sum(self.sizes(), BatchSize())
        return {
            "steps_measured": self.steps,
            "seconds_per_step": self.seconds / self.steps,
            "first_step_seconds": self.first_step,
            "compilations_after_warm_up": self.compilations,
            "rows_per_step": total.rows / self.steps,
            "tokens_per_step": total.tokens / self.steps,
            "tokens_per_second": total.tokens / self.seconds,
            "largest_micro_batch": self.largest()["inputs"]["input_ids"].numel(),
            **self.memory,
        }

    def sizes(self) -> list[BatchSize]:
        """What was in each step that was timed."""
        return [sum(map(batch_size, batch), BatchSize()) for batch in self.batches[WARM_UP_STEPS : self.last]]

    def largest(self) -> dict[str, Any]:
        """The micro-batch with the most tokens, of all steps."""
        return max((one for batch in self.batches for one in batch), key=lambda one: one["inputs"]["input_ids"].numel())


def _compilations() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _memory(device: torch.device) -> dict[str, float]:
    """GiB at the peak: in use, held by PyTorch, and held on the card in all."""
    found = {"peak_memory_gib": peak_memory(device) / 2**30}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
        found["context_gib"] = (total - free - torch.cuda.memory_reserved(device)) / 2**30
    return found


def _where_time_goes(profiler: Any) -> dict[str, Any]:
    """Of a profiled step: the greatest operations of device and processor, launches, waits, copies back."""
    events = profiler.key_averages()
    kernels = [e for e in events if e.device_type.name == "CUDA"]
    calls = [e for e in events if e.device_type.name == "CPU"]

    def count(*parts: str) -> int:
        return sum(e.count for e in calls if any(part in e.key for part in parts))

    def top(found: list[Any], time_of: str) -> list[list[Any]]:
        greatest = sorted(found, key=lambda e: -getattr(e, time_of))[:TOP]
        return [[e.key[:90], round(getattr(e, time_of) / 1e3, 2), e.count] for e in greatest]

    return {
        "device_milliseconds": sum(e.self_device_time_total for e in kernels) / 1e3,
        "kernels": sum(e.count for e in kernels),
        "launches": count("LaunchKernel", "GraphLaunch"),
        "waits": count("StreamSynchronize", "DeviceSynchronize", "EventSynchronize"),
        "copies_to_host": sum(e.count for e in kernels if "DtoH" in e.key),
        "top_on_device": top(kernels, "self_device_time_total"),
        "top_on_processor": top(calls, "self_cpu_time_total"),
    }


def matrix_rate(device: torch.device, size: int) -> float:
    """Operations a second of a bfloat16 matrix product on this device, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        begin = now()
        a @ b
        best = min(best, now() - begin)
    return 2 * size**3 / best


@contextlib.contextmanager
def quick_weights() -> Iterator[None]:
    """Let large random tensors on a CPU repeat a block of numbers: to draw 8 billion of them takes minutes."""
    kept = {name: getattr(torch.Tensor, name) for name in ("normal_", "uniform_")}

    def repeating(draw: Any) -> Any:
        def drawn(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            if self.device.type != "cpu" or self.numel() <= QUICK or not self.is_contiguous():
                return draw(self, *arguments, **options)
            block = draw(torch.empty(QUICK, device="cpu"), *arguments, **options).to(self.dtype)
            for part in self.detach().view(-1).split(QUICK):
                part.copy_(block[: len(part)])
            return self

        return drawn

    for name, draw in kept.items():
        setattr(torch.Tensor, name, repeating(draw))
    try:
        yield
    finally:
        for name, draw in kept.items():
            setattr(torch.Tensor, name, draw)


def settings(how: How, small: bool) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The options of model and data, and the precision, as the config has them; small, what serves a CPU."""
    config = yaml.safe_load((ROOT / "configs" / "reward" / f"{CONFIGS[how]}.yaml").read_text())
    shape = yaml.safe_load(SHAPE.read_text())["model"]
    model, data = config["model"] | shape, config["data"] | {"split": "published"}  # the paper trains on all of it
    if model.get("adapter"):
        model["adapter"] = AdapterOptions(**model["adapter"])
    if small:
        model |= {"scratch": SMALL, "dtype": "float32", "optimizer": "adamw", "compile": False}
        return model, data | {"num_workers": 0}, "32-true"
    return model, data, config["trainer"]["precision"]


def measure(
    root: str,
    how: How = "full",
    steps: int | None = None,
    epochs: float = EPOCHS,
    small: bool = False,
    devices: int = 1,
    more: dict[str, Any] | None = None,
    profiled: bool = True,
) -> dict[str, Any]:
    """Run the recipe, or a part of it; its figures.

    Args:
        root: A directory in the published layout.
        how: All weights, adapters on 4-bit weights, or all weights by FSDP2.
        steps: How many steps to measure, instead of epochs.
        epochs: How much of the recipe to run; the rest is reckoned from the steps measured.
        small: A backbone of 2 small layers, float32 Adam.
        devices: Above 1, this is one rank of as many, that torchrun has started.
        more: Options of model and data instead of the config's, by name.
        profiled: Whether to profile one more step.
    """
    logging.basicConfig(level=logging.INFO)  # the data module says there why it takes rows, if it does
    torch.set_float32_matmul_precision("high")
    seed_everything(0, verbose=False)
    model_options, data_options, precision = settings(how, small)
    for name, value in (more or {}).items():
        (model_options if name in model_options else data_options)[name] = value
    data = RewardDataModule(**data_options | {"root": root, "cache": False})
    model = RewardClassifier(**model_options)
    data.setup("fit")
    rows = len(data.split.train) + len(data.split.validation)
    recipe_steps = EPOCHS * math.ceil(rows / data.batch_size)
    counted = steps or max(math.ceil(epochs * data.steps_per_epoch) - WARM_UP_STEPS, 1)
    meter = Meter(counted, profiled)
    trainer = Trainer(
        max_steps=meter.last + profiled,
        devices=devices,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        strategy=FullySharded() if how == "fsdp2" else "auto",
        precision=precision,  # type: ignore[arg-type]
        callbacks=[SeedEachStep(), meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    begin = time.perf_counter()
    with quick_weights():
        trainer.fit(model, data)
    whole_fit = time.perf_counter() - begin
    assert model.network is not None
    device = trainer.strategy.root_device
    sizes = meter.sizes()
    total = sum(sizes, BatchSize())
    counts = Operations.of(model.network)
    operations = counts.count(total.unpadded_tokens, total.pairs, total.targets)
    setting = Setting(
        dtype=model_options["dtype"],
        precision=precision,
        optimizer=model_options["optimizer"],
        checkpointing=model_options["gradient_checkpointing"],
        adapter=model_options.get("adapter"),
        quantization=model_options.get("quantization", "none"),
        accumulates=any(len(batch) > 1 for batch in meter.batches),
        devices=devices,
        sharing="sharded" if how == "fsdp2" else "one device",
    )
    planned = MemoryPlan(RewardClassifier(**model_options), model.network.config, meter.largest()).memory(setting)
    rate = matrix_rate(device, 256 if small else 8192)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "how": how,
        "parameters": weight_count(model),
        "layout": data.layout,
        "attention": model.network.config._attn_implementation,
        "optimizer": model_options["optimizer"],
        "precision": precision,
        "gradient_checkpointing": model_options["gradient_checkpointing"],
        "token_budget": data.token_budget,
        **meter.figures(),
        "fit_seconds": whole_fit,
        "recipe_seconds": meter.seconds / meter.steps * recipe_steps,
        "recipe_steps": recipe_steps,
        "bf16_matrix_rate_tflops": rate / 1e12,
        "utilization": operations / meter.seconds / rate,
        "planned_memory_gib": planned.peak / 2**30,
        "planned": {name: size / 2**30 for name, size in vars(planned).items()},
        "losses": [float(loss) for loss in meter.losses],
        "profile": meter.profile,
    }


def now() -> float:
    """The time when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    figures = auto_cli(measure, as_positional=False)
    if rank_zero_only.rank == 0:
        print(json.dumps(figures))
