"""Planned memory, compared with the memory of small fits and with known parts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from datamodules.batching.steps import batch_size
from models.learning.reward_classifier import RewardClassifier
from models.networks.adapters import AdapterOptions, add_adapter
from models.networks.configurations import network_from_config
from models.networks.network_options import NetworkOptions
from models.networks.operations import GIB, Operations, trained_count, weight_count
from models.planning.changes import cheapest_fit
from models.planning.memory import MemoryPlan, Setting, optimizer_bytes
from tests.helpers import ROOT
from tests.models.small import small_data
from tests.patience import HANG

SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
SIZES = {"max_length": 400, "token_budget": 800, "micro_batch_size": 4, "batch_size": 8, "scenes_per_step": 2}
STEPS = 2
LLAMA_8B = AutoConfig.for_model(
    "llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_labels=2,
    pad_token_id=0,
)
# A tiny fit comes first, for what a process takes once: libraries and their buffers. Then its high-water mark is set
# back. Small allocations go back to the system at once.
MEASURE = f"""
import json, re, sys
from pathlib import Path
from tests.models.small import small_data, small_trainer
from models.learning.reward_classifier import RewardClassifier
root, options, data_options = json.loads(sys.argv[1])
def held(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for shape in ({SHAPE!r} | dict(hidden_size=64, intermediate_size=64), {SHAPE!r}):
    data, model = small_data(Path(root), **data_options), RewardClassifier(scratch=shape, dropout=0.0, **options)
    data.setup("fit")
    trainer = small_trainer(max_steps={STEPS}, limit_val_batches=0, num_sanity_val_steps=0)
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    trainer.fit(model, data)
print(held("VmHWM") - before)
"""


def measured(root: Path, options: dict[str, Any], data_options: dict[str, Any]) -> int:
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([str(root), options, data_options])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
        | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
    )
    return int(ended.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's high-water mark")
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("tree", {}),  # one micro-batch a step
        ("rows", {"gradient_checkpointing": True}),
        ("tree", {"adapter": {"rank": 8, "dropout": 0.0}, "attn_implementation": "eager"}),
    ],
)
def test_a_plan_is_within_15_percent_of_a_fits_memory(root: Path, layout: str, options: dict[str, Any]) -> None:
    data_options = SIZES | {"layout": layout}
    data = small_data(root, **data_options)
    data.setup("fit")
    shape = SHAPE | {"vocab_size": len(data.tokenizer), "pad_token_id": data.tokenizer.pad_token_id, "num_labels": 2}
    kind = shape.pop("model_type")
    model = RewardClassifier(dropout=0.0)
    steps = list(islice(data.epoch(layout), STEPS))  # type: ignore[arg-type]
    largest = max((micro for step in steps for micro in step), key=lambda micro: batch_size(micro).tokens)
    adapter = options.get("adapter")
    setting = Setting(
        dtype="float32",
        precision="32-true",
        optimizer="adamw",
        checkpointing=options.get("gradient_checkpointing", False),
        adapter=AdapterOptions(**adapter) if adapter else None,
        accumulates=max(map(len, steps)) > 1,
    )
    config = AutoConfig.for_model(kind, **shape)
    plan = MemoryPlan(model, config, largest, options.get("attn_implementation"))
    assert model.network is None
    found = measured(root, options, data_options)
    planned = plan.memory(setting)
    print(f"{layout}, {options}: planned {planned.peak / 2**20:.0f} MiB, measured {found / 2**20:.0f} MiB")
    assert planned.peak == pytest.approx(found, rel=0.15)


def test_frozen_layers_have_no_gradients_optimizer_state_and_activations(root: Path) -> None:
    data = small_data(root, **SIZES, layout="tree")
    data.setup("fit")
    shape = SHAPE | {"vocab_size": len(data.tokenizer), "pad_token_id": data.tokenizer.pad_token_id, "num_labels": 2}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    largest = next(iter(data.epoch("tree")))[0]
    setting = Setting(dtype="float32", precision="32-true", optimizer="adamw", accumulates=False)
    plan = MemoryPlan(RewardClassifier(dropout=0.0, backbone="pretrained", freeze_layers=5), config, largest)
    network, memory = plan.network(setting), plan.memory(setting)
    upper = [*network.base_model.layers[5:], network.base_model.norm, network.score]
    trained = sum(weight.numel() for module in upper for weight in module.parameters())
    assert memory.weights == 4 * weight_count(network)
    assert memory.gradients == 4 * trained
    assert memory.optimizer == 8 * trained
    assert memory.activations == pytest.approx(plan._tracked(setting, None), rel=0.05)  # without extrapolation


def plan_8b(**options: Any) -> tuple[MemoryPlan, Setting]:
    tree = {name: torch.zeros(1, 8, dtype=torch.int64) for name in ("input_ids", "position_ids", "subtree_end")}
    rows = {name: torch.zeros(4, dtype=torch.int64) for name in ("label", "category", "row")}
    batch = {"inputs": tree | {"read_out": torch.zeros(4, dtype=torch.int64)}, "weight": torch.ones(4), **rows}
    setting = Setting(dtype="float32", precision="bf16-mixed", optimizer="adamw", tokens=256, on_gpu=True)
    return MemoryPlan(RewardClassifier(), LLAMA_8B, batch), replace(setting, **options)


def test_memory_of_an_8b_model_has_the_known_parts() -> None:
    plan, setting = plan_8b()
    memory = plan.memory(setting)
    parameters = weight_count(plan.network(setting))
    assert parameters == 7_504_924_672 + 2 * 4096  # Llama-3.1-8B without its own head, and one of two classes
    assert memory.weights == memory.gradients == 4 * parameters
    assert memory.optimizer == 8 * parameters
    assert memory.communication == 0
    sharded = plan.memory(replace(setting, devices=8, sharing="sharded"))
    assert sharded.weights == memory.weights // 8
    assert 0 < sharded.communication < 8 * GIB
    assert plan.memory(replace(setting, devices=8, sharing="replicated")).communication == memory.gradients


def test_four_bits_and_an_adapter_fit_24_gib() -> None:
    plan, setting = plan_8b(
        dtype="bfloat16", adapter=AdapterOptions(), quantization="nf4", checkpointing=True, tokens=4096
    )
    memory = plan.memory(setting)
    assert 4 * GIB < memory.weights < 5 * GIB
    assert memory.peak < 12 * GIB


def test_replacements_have_as_many_weights_as_the_libraries_layers() -> None:
    """Compared with the quantized layers and adapters of the libraries."""
    small = AutoConfig.for_model(**SHAPE | {"num_hidden_layers": 2, "vocab_size": 300, "num_labels": 2})
    plan = MemoryPlan(RewardClassifier(), small, {})
    for kind in ("none", "int8", "nf4"):
        setting = Setting("float32", "32-true", "adamw", adapter=AdapterOptions(), quantization=kind)  # type: ignore[arg-type]
        planned = plan.network(setting)
        real = network_from_config(NetworkOptions("classifier"), small.to_dict())
        add_adapter(real, "classifier", AdapterOptions(), kind)  # type: ignore[arg-type]
        assert trained_count(planned) == trained_count(real)
        assert weight_count(planned) == weight_count(real)
        assert Operations.of(planned) == Operations.of(real)


def test_the_cheapest_change_that_fits_is_found() -> None:
    plan, setting = plan_8b()
    found = cheapest_fit(plan, setting, longest=256, room=80 * GIB)
    assert found is not None
    (change,), memory = found
    assert "devices" in change.what
    assert memory.peak <= 80 * GIB
    found = cheapest_fit(plan, setting, longest=256, room=8 * GIB)
    assert found is not None
    assert found[1].peak <= 8 * GIB
    assert cheapest_fit(plan, setting, longest=256, room=GIB) is None


def test_eight_bit_optimizers_keep_float32_state_for_small_tensors() -> None:
    vector, matrix = torch.empty(1024), torch.empty(256, 256)
    assert optimizer_bytes(vector, "paged_adamw_8bit") == optimizer_bytes(vector, "adamw") == 8 * 1024
    assert optimizer_bytes(matrix, "paged_adamw_8bit") == 2 * 2**16 + 2 * 4 * 2**8
    assert optimizer_bytes(vector, "adamw_8bit") == 8 * 1024
    assert optimizer_bytes(matrix, "adamw_8bit") == 2 * 2**16 + 2 * 4 * 2**10
    assert optimizer_bytes(matrix.bfloat16(), "adamw_8bit") == 3 * 2**16 + 2 * 4 * 2**10
