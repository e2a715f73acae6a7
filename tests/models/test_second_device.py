"""Training, judging and writing on another device than the CPU: the same results, no mixed devices, few waits.

The device is that of `tests.second_device`. What only CUDA has is not tested here: FlexAttention, CUDA graphs, pinned
memory and quantized layers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoint_io import SafeCheckpointIO
from callbacks.seeding import SeedEachStep
from datamodules.batching.answer_rows import AgentDataModule
from datamodules.batching.history_rows import HistoryDataModule
from datamodules.batching.preference_rows import PreferenceDataModule
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Pair
from models.decoding import generation
from models.decoding.fixed_branches import FixedBranchReader
from models.judging.scorer import Scorer
from models.judging.weights import Weights
from models.learning.preference_agent import PreferenceAgent
from models.learning.proactive_agent import ProactiveAgent
from models.learning.saved_models import export_weights
from models.learning.training import BackboneModule
from models.networks import devices
from models.networks.adapters import AdapterOptions
from models.online.online_agent import OnlineAgent
from tests import second_device
from tests.models.decoding.test_generation import generated, network, uneven_traces
from tests.models.small import DECODERS, small_classifier, small_data, small_trainer
from tests.ranks import on_ranks

STEPS = 4
SCRATCH = {"model_type": "llama", **DECODERS["llama"]}
DATA: dict[str, Any] = {
    "folds": 3,
    "vocabulary_size": 400,
    "scenes_per_step": None,
    "max_length": 400,
    "token_budget": 900,
    "batch_size": 6,
    "cache": False,
}
Task = tuple[BackboneModule, Any]


class Waits(Callback):
    """Collects the lines of this project that waited for the device in steps after the first, and in validations."""

    def __init__(self) -> None:
        self.in_steps: list[str] = []
        self.in_validations: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        second_device.waits.clear()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step > 1:
            self.in_steps += second_device.waits

    def on_validation_start(self, trainer: Trainer, *args: Any) -> None:
        second_device.waits.clear()

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self.in_validations += second_device.waits


def agent_options(**options: Any) -> dict[str, Any]:
    defaults = {"scratch": SCRATCH, "learning_rate": 1e-2, "dropout": 0.0, "sampled_answers": 2}
    return {**defaults, **options}


def reward(root: Path, folder: Path, **options: Any) -> Task:
    return small_classifier(**options), small_data(root, layout="tree", token_budget=400)


def encoder(root: Path, folder: Path) -> Task:
    return small_classifier("bert", category_weights={"false_alarm": 2.0}), small_data(root)


def adapter(root: Path, folder: Path) -> Task:
    return reward(root, folder, adapter=AdapterOptions(rank=2, dropout=0.0), gradient_checkpointing=True)


def eight_bits(root: Path, folder: Path) -> Task:
    return reward(root, folder, optimizer="adamw_8bit")


def agent(root: Path, folder: Path) -> Task:
    return ProactiveAgent(**agent_options()), AgentDataModule(root=str(root), layout="tree", **DATA)


def kto(root: Path, folder: Path) -> Task:
    data = PreferenceDataModule(root=str(root), objective="kto", layout="tree", **DATA)
    return PreferenceAgent(**agent_options(objective="kto")), data


def online(root: Path, folder: Path) -> Task:
    """Training of an exported agent, rewarded by an exported judge."""
    for name, task in (("agent", agent), ("judge", reward)):
        torch.manual_seed(0)
        model, data = task(root, folder)
        small_trainer(max_steps=12, max_epochs=-1, limit_val_batches=0).fit(model, data)
        (folder / name).mkdir(exist_ok=True)
        export_weights(model, folder / name, data.state_dict())
        data.tokenizer.save_pretrained(folder / name)
    backbone = str(folder / "agent")
    options = agent_options(backbone=backbone, scratch=None, max_new_tokens=16)
    data = HistoryDataModule(root=str(root), tokenizer=backbone, max_new_tokens=16, **{**DATA, "batch_size": 2})
    return OnlineAgent(str(folder / "judge"), **options), data


TASKS: dict[str, Callable[[Path, Path], Task]] = {
    task.__name__: task for task in (reward, encoder, adapter, eight_bits, agent, kto, online)
}


def fitted(task: str, root: Path, folder: Path, **device: str) -> dict[str, Any]:
    """The figures of a short run, and the lines that waited for the device."""
    model, data = TASKS[task](root, folder)
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    waits = Waits()
    torch.manual_seed(0)
    trainer = small_trainer(
        *(SeedEachStep(), waits, Losses()),
        **device,
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        plugins=[SafeCheckpointIO(type(model))],
    )
    trainer.fit(model, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(model, data, verbose=False)
    return {
        "losses": losses,
        "metrics": metrics,
        "test": model.test_metrics,
        "in_steps": waits.in_steps,
        "in_validations": waits.in_validations,
    }


def without_float64() -> None:
    second_device.lacks_float64()
    devices.WITHOUT_FLOAT64.add(second_device.NAME)


def on_both(task: str, root: Path, folder: Path) -> list[dict[str, Any]]:
    second_device.register()
    on_cpu = fitted(task, root, folder)
    without_float64()
    return [on_cpu, fitted(task, root, folder, accelerator=second_device.NAME, strategy=second_device.NAME)]


def close(found: dict[str, float]) -> Any:
    return pytest.approx(found, abs=1e-4, nan_ok=True)


def other(waits: list[str], *lines: str) -> list[str]:
    """Those that none of some lines of code explains."""
    return [wait for wait in waits if not any(line in wait for line in lines)]


FINITE_CHECK = "self._values = stacked.cpu()"  # on CUDA it copies in the background
ROWS, FLOAT64 = "dim_zero_cat", "if values.device.type in WITHOUT_FLOAT64"  # at the end; a device with float64 keeps it
PADDING = "attention_mask=attention_mask"  # transformers looks once per forward pass whether rows are padded
WRITING = ("models/decoding/", "models/networks/self_checks.py", "models/online/", "models/judging/")


@pytest.mark.parametrize("task", TASKS)
def test_a_run_on_another_device_without_float64_gives_the_figures_of_the_cpu(
    task: str, root: Path, tmp_path: Path
) -> None:
    """So every tensor is where it is needed, and trees hardly wait for the device. Apple GPUs have no float64."""
    on_cpu, on_second = on_ranks(1, on_both, task, root, tmp_path, folder=tmp_path / "results")
    assert len(on_cpu["losses"]) == STEPS
    assert on_second["losses"] == pytest.approx(on_cpu["losses"], abs=1e-4)
    assert on_second["metrics"] == close(on_cpu["metrics"])
    assert set(on_second["test"]) == set(on_cpu["test"])
    for reading, figures in on_cpu["test"].items():
        assert on_second["test"][reading] == close(figures)

    explained = {"encoder": (PADDING,), "online": (FLOAT64, *WRITING)}.get(task, ())
    in_steps, in_validation = on_second["in_steps"], on_second["in_validations"]
    assert other(in_steps, FINITE_CHECK, *explained) == []
    assert len(other(in_steps, *explained)) == STEPS - 1, "the finite check was counted"
    assert other(in_validation, ROWS, FLOAT64, *explained, *WRITING) == []
    assert 3 <= len([wait for wait in in_validation if ROWS in wait]) <= 4, "each column of the rows is read once"


EVENTS = tuple(Event(time=str(10 * n), event=f"The user opens file number {n * n % 7}") for n in range(8))
PAIRS = [Pair(EVENTS[:n], proposal) for n in (1, 4, 8) for proposal in (None, "Run the tests", "Open a file")]


def scored(root: Path, folder: Path) -> list[list[list[float]]]:
    """P(accepted) of many histories at once, and along a session, on the CPU and on the device."""
    second_device.register()
    model, data = reward(root, folder)
    small_trainer(max_steps=8, max_epochs=-1, limit_val_batches=0).fit(model, data)
    without_float64()
    found = []
    for device in (torch.device("cpu"), second_device.device()):
        scorer = Scorer(Weights(model, data.state_dict(), "here"), device)
        session = [
            one for start in range(0, len(PAIRS), 3) for one in scorer.score(PAIRS[start : start + 3], "session")
        ]
        found.append([scorer.score(PAIRS), session])
        assert model.network is not None
        assert model.network.device == device
        scorer.release()
    return found


def test_a_judge_scores_the_same_on_another_device(root: Path, tmp_path: Path) -> None:
    on_cpu, on_second = on_ranks(1, scored, root, tmp_path, folder=tmp_path / "results")
    for expected, found in zip(on_cpu, on_second, strict=True):
        assert len(set(expected)) == len(PAIRS)
        assert found == pytest.approx(expected, abs=1e-5)


def written(fixed: bool, temperature: float) -> tuple[list[Any], list[Any], list[list[str]]]:
    """The tokens of answers on the CPU and on the device, and what waited for it in each step of fixed shapes."""
    second_device.register()
    model, traces = network("llama"), uneven_traces()
    options: dict[str, Any] = {"branched": True, "temperature": temperature, "candidates": 2 if temperature else 1}
    expected = generated(model, traces, **options)
    in_steps: list[list[str]] = []
    if fixed:
        original = FixedBranchReader._step

        def step(reader: FixedBranchReader) -> Any:
            before = len(second_device.waits)
            found = original(reader)
            in_steps.append(second_device.waits[before:])
            return found

        FixedBranchReader._step = step  # type: ignore[method-assign]
        generation._reader = FixedBranchReader
    without_float64()
    found = generated(model.to(second_device.device()), traces, **options)
    return [list(one.token_ids) for one in expected.values()], [list(one.token_ids) for one in found.values()], in_steps


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed shapes"])
def test_answers_are_the_same_on_another_device(fixed: bool, temperature: float, tmp_path: Path) -> None:
    """With fixed shapes, a step waits for nothing, or CUDA could not capture it as a graph."""
    on_cpu, on_second, in_steps = on_ranks(1, written, fixed, temperature, folder=tmp_path)
    assert sum(map(len, on_cpu)) > 100
    assert on_second == on_cpu
    assert in_steps == [[]] * len(in_steps)
    assert bool(in_steps) is fixed
