"""configure_model with another default device than the CPU, as a trainer with a GPU calls it.

The meta device takes the place of the GPU. A tensor that is created there by mistake has no values, so its use fails.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from callbacks.saving import LastCheckpoint
from datamodules.batching.answer_rows import AgentDataModule
from models.decoding.branch_checks import branch_problem
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.learning.saved_models import model_from_checkpoint
from models.learning.training import BackboneModule
from models.networks.adapters import AdapterOptions
from models.networks.quantization import Quantization
from models.networks.tree_reading import tree_problem
from tests.models.small import LLAMA, small_data, small_trainer

ADAPTED: tuple[Quantization, ...] = ("none", "int8", "nf4")


class OtherDefault(SingleDeviceStrategy):
    """The CPU, with the meta device as default for new tensors while configure_model runs."""

    def __init__(self) -> None:
        super().__init__(device="cpu")

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with torch.device("meta"), super().tensor_init_context(empty_init), torch.device("meta"):
            yield


def options_of(case: str, base: Path) -> dict[str, Any]:
    adapter = AdapterOptions(rank=2, dropout=0.1)
    return {
        "scratch": {"scratch": LLAMA},
        "pretrained": {"backbone": str(base)},
        "adapter on scratch": {"scratch": LLAMA, "adapter": adapter},
        "none": {"backbone": str(base), "adapter": adapter},
        "int8": {"backbone": str(base), "adapter": adapter, "quantization": "int8"},
        "nf4": {"backbone": str(base), "adapter": adapter, "quantization": "nf4"},
    }[case]


def reward(case: str, root: Path, base: Path) -> tuple[BackboneModule, Any]:
    options: dict[str, Any] = {} if "scratch" in case else {"tokenizer": str(base)}
    return RewardClassifier(**options_of(case, base)), small_data(root, layout="tree", token_budget=400, **options)


def agent(case: str, root: Path, base: Path) -> tuple[BackboneModule, Any]:
    options: dict[str, Any] = {} if "scratch" in case else {"tokenizer": str(base)}
    data = AgentDataModule(
        root=str(root), folds=3, max_length=300, batch_size=8, token_budget=500, layout="tree", cache=False, **options
    )
    return ProactiveAgent(sampled_answers=1, **options_of(case, base)), data


def losses(model: BackboneModule, data: Any, *callbacks: Any, **options: Any) -> list[float]:
    """The losses of a fit of two steps with a validation."""
    found: list[float] = []
    original = model.training_step

    def step(*arguments: Any) -> None:
        original(*arguments)
        found.append(float(model.trainer.callback_metrics["train/loss"]))

    model.training_step = step  # type: ignore[method-assign]
    torch.manual_seed(0)
    trainer = small_trainer(*callbacks, max_steps=2, val_check_interval=2, limit_val_batches=2, **options)
    trainer.fit(model, data)
    return [*found, float(trainer.callback_metrics["validation/loss"])]


@pytest.mark.parametrize("case", ["scratch", "pretrained", "adapter on scratch", *ADAPTED])
@pytest.mark.parametrize("task", [reward, agent])
def test_losses_and_layout_do_not_depend_on_the_default_device(task: Any, case: str, root: Path, base: Path) -> None:
    runs = []
    for strategy in ("auto", OtherDefault()):
        model, data = task(case, root, base)
        runs.append((losses(model, data, strategy=strategy), model.base))
        assert data.layout == "tree"
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert runs[0] == runs[1], "losses of training and validation, and the digest of an adapter's base"
    assert len(runs[0][0]) == 3


@pytest.mark.parametrize("case", ["pretrained", "nf4"])
def test_a_loaded_model_is_tested_under_another_default_device(
    case: str, root: Path, base: Path, tmp_path: Path
) -> None:
    model, data = reward(case, root, base)
    losses(model, data, LastCheckpoint(tmp_path))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    found = []
    for strategy in ("auto", OtherDefault()):
        kept = model_from_checkpoint(RewardClassifier, checkpoint)
        small_trainer(strategy=strategy).test(kept, small_data(root, layout="tree", tokenizer=str(base)), verbose=False)
        found.append(kept.test_metrics)
    assert found[0] == found[1]


def test_self_checks_create_tensors_on_the_networks_device(root: Path, base: Path) -> None:
    """Also if other code than configure_model calls them."""
    model, data = agent("pretrained", root, base)
    losses(model, data)
    assert model.network is not None
    model.eval()
    with torch.device("meta"):
        assert tree_problem(model.network, 300) is None
        assert branch_problem(model.network, 300) is None


@pytest.mark.parametrize("task", [reward, agent])
def test_bf16_true_keeps_rotary_frequencies_and_the_loss_in_float32(task: Any, root: Path, base: Path) -> None:
    """In bfloat16, rotary frequencies could not distinguish distant positions."""
    model, data = task("pretrained", root, base)
    model.hparams["dtype"] = "bfloat16"
    found = losses(model, data, precision="bf16-true")
    assert model.network is not None
    rotary = [buffer for name, buffer in model.network.named_buffers() if "inv_freq" in name]
    assert {buffer.dtype for buffer in rotary} == {torch.float32}
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.bfloat16}
    assert found[0] != float(torch.tensor(found[0]).bfloat16()), "a loss has more than 8 significant bits"
