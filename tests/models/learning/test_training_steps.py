"""A step copies nothing from the device to the CPU, and its losses are those of a plain training loop.

A copy from a GPU waits for all queued kernels, and then the GPU waits for the CPU.
"""

from collections import Counter
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.seeding import SeedEachStep
from callbacks.throughput import ThroughputLog
from datamodules.batching.answer_rows import AgentDataModule
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.learning.training import BackboneModule
from models.networks.adapters import AdapterOptions
from tests.models.small import LLAMA, small_data, small_trainer

READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal")
FIRST, LAST = 3, 5  # the steps that are looked at; before them come sizes, states and Lightning's own records


class Reads(Callback):
    """Counts values copied to the CPU in some steps, including callbacks. A loader's tensors are on the CPU."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.profile = torch.profiler.profile()
        self.profile.start()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.profile.stop()
        if trainer.global_step > FIRST:
            self.counts.update({event.key: event.count for event in self.profile.key_averages()})


def reward(root: Path, base: Path, **options: Any) -> tuple[BackboneModule, Any]:
    data = small_data(root, tokenizer=str(base), layout="tree", token_budget=400)
    return RewardClassifier(backbone=str(base), **options), data


def agent(root: Path, base: Path, **options: Any) -> tuple[BackboneModule, Any]:
    sizes: dict[str, Any] = {"folds": 3, "max_length": 300, "batch_size": 8, "token_budget": 500, "cache": False}
    data = AgentDataModule(root=str(root), tokenizer=str(base), layout="tree", **sizes)
    return ProactiveAgent(backbone=str(base), sampled_answers=0, **options), data


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "32-true"),
        ({"dtype": "bfloat16"}, "bf16-true"),
        ({"adapter": AdapterOptions(rank=2), "dtype": "bfloat16"}, "bf16-mixed"),
    ],
    ids=["float32", "bfloat16", "adapter"],
)
@pytest.mark.parametrize("task", [reward, agent])
def test_no_step_waits_for_the_device(
    task: Any, options: dict[str, Any], precision: Any, root: Path, base: Path
) -> None:
    """With replacements for PyTorch's AdamW and the attention of trees, which read values on a CPU."""
    model, data = task(root, base, attn_implementation="sdpa", optimizer="adamw_8bit", **options)
    reads = Reads()
    callbacks = [SeedEachStep(), ThroughputLog(window=2), reads]
    small_trainer(*callbacks, max_epochs=LAST, max_steps=LAST, precision=precision, limit_val_batches=0).fit(
        model, data
    )
    assert reads.counts["aten::mm"] > 0, "something was counted"
    assert {name: reads.counts[name] for name in READS if name in reads.counts} == {}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_losses_equal_a_plain_training_loop(optimizer: Any, root: Path) -> None:
    """Bit-identical: the checks do not change them."""
    options: dict[str, Any] = {"scratch": LLAMA, "optimizer": optimizer, "dropout": 0.0, "learning_rate": 1e-2}
    torch.manual_seed(0)
    model, data = RewardClassifier(**options), small_data(root, layout="tree", token_budget=400)
    logged: list[float] = []
    batches: list[Any] = []

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            batches.append(batch)
            logged.append(float(trainer.callback_metrics["train/loss"]))

    keep = Keep()
    trainer = small_trainer(SeedEachStep(), keep, max_steps=6, limit_val_batches=0)
    trainer.fit(model, data)
    model.load_state_dict(keep.state)
    found = model.configure_optimizers()
    plain, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]  # type: ignore[index, call-overload]
    expected = []
    for batch in batches:
        total = 0.0
        for micro_batch in batch:
            loss = model.loss(micro_batch)
            loss.backward()
            total += float(loss.detach())
        if optimizer == "adamw":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            plain.gradient_scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        plain.step()
        plain.zero_grad()
        schedule.step()
        expected.append(total)
    assert logged == pytest.approx(expected, rel=1e-6)


def test_compiled_blocks_are_one_graph_for_all_layers_and_lengths(
    root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first step compiles: neither the self-checks before it nor later steps do."""
    graphs: list[int] = []  # of each, in which step it was made
    steps: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(steps))
        return graph.forward

    class Steps(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            steps.append(sum(micro_batch["size"]["tokens"] for micro_batch in batch))

    torch.compiler.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    runs = []
    for compile in (False, True):
        model, data = reward(root, base, attn_implementation="sdpa", compile=compile)
        torch.manual_seed(0)
        steps.clear()
        trainer = small_trainer(SeedEachStep(), Steps(), max_steps=5, limit_val_batches=0)
        trainer.fit(model, data)
        runs.append(float(trainer.callback_metrics["train/loss"]))
    assert len(set(steps)) > 2, "steps differ in length"
    assert graphs == [1]
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
