"""LoRA and QLoRA: trained weights, checkpoints, exports, refused options, and self-checks of quantized backbones."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.saving import LastCheckpoint
from callbacks.seeding import SeedEachStep
from datamodules.batching.answer_rows import AgentDataModule
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.errors import UserError
from models.learning.checkpoint_files import load_trained
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.learning.saved_models import export_weights, model_from_export
from models.learning.training import BackboneModule
from models.networks.adapter_files import trained_names
from models.networks.adapters import AdapterOptions
from models.networks.configurations import network_from_config
from models.networks.heads import language_problem
from models.networks.network_options import NetworkOptions
from models.networks.operations import weight_count
from models.networks.quantization import Quantization
from models.networks.tree_reading import pair_cost, tree_problem
from tests.models.small import LLAMA, fit, probabilities, small_data, small_trainer

KINDS: tuple[Quantization, ...] = ("none", "int8", "nf4")


LAYER = {"none": torch.nn.Linear, "int8": Linear8bitLt, "nf4": Linear4bit}


def classifier(base: Path, quantization: Quantization = "nf4", **options: Any) -> RewardClassifier:
    adapter = AdapterOptions(**{"rank": 4, "alpha": 8, "dropout": 0.0, **options.pop("adapter", {})})
    return RewardClassifier(
        backbone=str(base), adapter=adapter, quantization=quantization, **{"learning_rate": 1e-2, **options}
    )


def reward_data(root: Path, base: Path, **options: Any) -> RewardDataModule:
    return small_data(root, tokenizer=str(base), layout="tree", token_budget=400, **options)


def a_batch(data: RewardDataModule) -> Any:
    return next(iter(data.train_dataloader()))[0]


def trained(module: BackboneModule) -> dict[str, Tensor]:
    names = trained_names(module)
    return {name: weight.clone() for name, weight in module.state_dict().items() if name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_and_the_new_head_are_trained(root: Path, base: Path, kind: Quantization) -> None:
    model, data = classifier(base, kind), reward_data(root, base)
    fit(model, data, limit_train_batches=1, limit_val_batches=0)
    network = model.network
    assert network is not None
    layers = network.base_model.layers
    assert type(layers[0].mlp.up_proj.get_base_layer()) is LAYER[kind]
    names = trained_names(network)
    assert "score.weight" in names
    assert all("lora_" in name for name in names - {"score.weight"})
    assert len(names) == 1 + 2 * 7 * 2
    assert {network.get_parameter(name).dtype for name in names} == {torch.float32}
    assert data.layout == "tree"
    assert tree_problem(network, 160) is None


def test_quantization_does_not_change_the_counted_operations(root: Path, base: Path) -> None:
    counts, costs = [], []
    for kind in KINDS:
        model = classifier(base, kind, adapter={"rank": 1})
        fit(model, reward_data(root, base), limit_train_batches=0, limit_val_batches=0)
        assert model.network is not None
        counts.append(weight_count(model.network))
        costs.append(pair_cost(model.network))
    assert len(set(counts)) == len(set(costs)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_learns_with_adapters(root: Path, base: Path, kind: Quantization) -> None:
    options: dict[str, Any] = {"folds": 3, "max_length": 200, "batch_size": 8, "token_budget": 400, "cache": False}
    data = AgentDataModule(root=str(root), tokenizer=str(base), layout="tree", **options)
    adapter = AdapterOptions(rank=4, dropout=0.0)
    agent = ProactiveAgent(
        backbone=str(base), adapter=adapter, quantization=kind, learning_rate=1e-2, sampled_answers=0
    )
    losses: list[float] = []
    torch.manual_seed(0)
    trainer = small_trainer(max_epochs=3)
    original = agent.on_validation_epoch_end

    def noting() -> None:
        original()
        losses.append(float(trainer.callback_metrics["validation/loss"]))

    agent.on_validation_epoch_end = noting  # type: ignore[method-assign]
    trainer.fit(agent, data)
    assert agent.network is not None
    assert all("lora_" in name for name in trained_names(agent.network)), "the head is the base's own"
    assert language_problem(agent.network) is None
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_fit_on_a_quantized_backbone_reduces_the_loss(root: Path, base: Path, kind: Quantization) -> None:
    model, data = classifier(base, kind), reward_data(root, base)
    fit(model, data, max_epochs=1, limit_train_batches=0, limit_val_batches=0)

    def mean_loss() -> float:
        model.eval()
        with torch.no_grad():
            return sum(float(model.loss(micro)) for step in data.train_dataloader() for micro in step)

    before = mean_loss()
    model.train()
    fit(model, data, max_epochs=20, limit_val_batches=0)
    assert mean_loss() < 0.95 * before


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_identical(root: Path, base: Path, tmp_path: Path, kind: Quantization) -> None:
    def run(folder: Path, *callbacks: Callback, checkpoint: Path | None = None) -> RewardClassifier:
        model = classifier(base, kind, adapter={"dropout": 0.1})
        torch.manual_seed(0)
        trainer = small_trainer(SeedEachStep(), LastCheckpoint(folder, every_n_steps=2), *callbacks, max_epochs=2)
        with contextlib.suppress(KilledError):
            trainer.fit(model, reward_data(root, base), ckpt_path=checkpoint, weights_only=True)
        return model

    whole = run(tmp_path / "whole")
    stopped = run(tmp_path / "parts", KillAfter(step=9))
    resumed = run(tmp_path / "parts", checkpoint=tmp_path / "parts" / "last.ckpt")
    expected, found, early = trained(whole), trained(resumed), trained(stopped)
    assert not any(torch.equal(weight, early[name]) for name, weight in expected.items())
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


class KilledError(Exception):
    """Simulates a killed process."""


class KillAfter(Callback):
    """Ends the run after a step, without saving."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


@pytest.fixture(scope="module")
def fitted(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Trains each classifier once, by quantization and dtype; returns it with its data and checkpoint."""
    made: dict[tuple[str, str], Any] = {}

    def get(kind: Quantization, dtype: str = "float32") -> Any:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("run")
            model, data = classifier(base, kind, dtype=dtype), reward_data(root, base)
            fit(model, data, LastCheckpoint(folder), limit_val_batches=0)
            made[kind, dtype] = (model, data, folder / "last.ckpt")
        return made[kind, dtype]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_contains_only_trained_weights(fitted: Callable[..., Any], kind: Quantization) -> None:
    model, data, path = fitted(kind)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == trained_names(model)
    again, _, _ = load_trained((RewardClassifier,), path, "--checkpoint")
    batch = a_batch(data)
    assert torch.allclose(probabilities(again, batch), probabilities(model, batch), rtol=1e-5)  # attends otherwise


def test_an_adapter_with_a_missing_or_other_base_is_refused(
    fitted: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    _, _, path = fitted("nf4")
    away = base.rename(tmp_path / "away")
    try:
        with pytest.raises(UserError, match="only the weights of an adapter are stored, and its base is missing"):
            load_trained((RewardClassifier,), path, "--checkpoint")
        torch.manual_seed(2)
        config = json.loads((away / "config.json").read_text())
        network_from_config(NetworkOptions("language model"), config).save_pretrained(base)
        with pytest.raises(UserError, match="has other weights now"):
            load_trained((RewardClassifier,), path, "--checkpoint")
    finally:
        for file in base.glob("*"):
            file.unlink()
        base.rmdir()
        away.rename(base)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_an_exported_adapter(
    fitted: Callable[..., Any], base: Path, tmp_path: Path, kind: Quantization
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model, data, _ = fitted(kind)
    export_weights(model, tmp_path, data.state_dict())
    assert not (tmp_path / "model.safetensors").exists()
    again, _ = model_from_export(RewardClassifier, tmp_path)
    batch = a_batch(data)
    expected = probabilities(model, batch)
    assert torch.allclose(probabilities(again, batch), expected, rtol=1e-5)  # attends otherwise
    if kind == "none":
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        rows = a_batch(reward_rows(data, base))
        with torch.no_grad():
            logits = PeftModel.from_pretrained(plain, tmp_path).eval()(
                input_ids=rows["inputs"]["input_ids"], attention_mask=rows["inputs"]["attention_mask"]
            )[0]
        assert torch.allclose(logits.double().softmax(-1)[:, 1], probabilities(model, rows), atol=1e-5)


def reward_rows(data: RewardDataModule, base: Path) -> RewardDataModule:
    rows = small_data(Path(data.root), tokenizer=str(base), layout="rows")
    rows.setup("fit")
    return rows


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_export_is_adapter_plus_base(
    fitted: Callable[..., Any], tmp_path: Path, kind: Quantization, dtype: str, tolerance: float
) -> None:
    model, data, _ = fitted(kind, dtype)
    unmerged = model.adapter
    model.adapter = AdapterOptions(**{**vars(unmerged), "merge": True})
    export_weights(model, tmp_path, data.state_dict())
    model.adapter = unmerged
    again, _ = model_from_export(RewardClassifier, tmp_path)
    assert again.adapter is None
    assert not any("lora" in name for name in again.state_dict())
    if kind == "int8":
        return  # its layers round what they read as well, which a plain layer does not
    batch = a_batch(data)
    assert torch.allclose(probabilities(again, batch), probabilities(model, batch), rtol=0, atol=tolerance)


def test_a_base_from_scratch_is_rebuilt_identically(root: Path, tmp_path: Path) -> None:
    model = RewardClassifier(scratch=LLAMA, adapter=AdapterOptions(rank=2), quantization="nf4")
    data = small_data(root, layout="tree", token_budget=400)
    fit(model, data, LastCheckpoint(tmp_path), limit_val_batches=0)
    torch.manual_seed(7)
    again, _, _ = load_trained((RewardClassifier,), tmp_path / "last.ckpt", "--checkpoint")
    batch = a_batch(data)
    assert torch.allclose(probabilities(again, batch), probabilities(model, batch), rtol=1e-5)  # attends otherwise
