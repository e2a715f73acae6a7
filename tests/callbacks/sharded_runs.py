"""Small fits of models that are spread over ranks, to be called on each of them by `tests.ranks.on_ranks`."""

import contextlib
import os
import resource
import signal
import warnings
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from callbacks import fully_sharded
from callbacks.fully_sharded import FullySharded
from callbacks.saving import LastCheckpoint
from callbacks.seeding import SeedEachStep
from callbacks.stopping import Interrupted, StopOnSignal
from datamodules.errors import UserError
from datamodules.files import writing
from models.learning import sharded_files as shards
from models.learning.reward_classifier import RewardClassifier
from models.networks.sharding import blocks, gather
from tests.models.small import LLAMA, fit, small_classifier, small_data, small_trainer

STEP = {"max_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}


class Curve(Callback):
    """The loss and the gradient's norm of each step."""

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        found = trainer.callback_metrics
        self.values.append([float(found["train/loss"]), float(found["train/gradient_norm"])])


def whole_weights(classifier: RewardClassifier) -> dict[str, torch.Tensor]:
    assert classifier.network is not None
    weights = gather(classifier.network) or classifier.network.state_dict()
    return {name: weight.detach().clone() for name, weight in weights.items()}


def sharded(replicas: int = 1, **options: Any) -> dict[str, Any]:
    """A trainer's options as `fit` gives them."""
    devices = int(os.environ["RANKS_OF_TEST"])
    return {"devices": devices, "strategy": FullySharded(replicas), "inference_mode": False, **options}


def steps(root: Path, cases: list[tuple[str, dict[str, Any], dict[str, Any]]], replicas: int = 1) -> list[Any]:
    """For each case (family, options of model and data): the weights before a step, its curve, the weights after it.

    Without replicas, on one device and not sharded.
    """
    warnings.filterwarnings("ignore")
    results = []
    for family, model_options, data_options in cases:
        classifier = small_classifier(family, **model_options)
        curve, before = Curve(), Before()
        fit(
            classifier,
            small_data(root, **{"tokenizer": classifier.hparams["backbone"], **data_options}),
            curve,
            before,
            **STEP,
            **(sharded(replicas) if replicas else {}),
        )
        results.append({"before": before.weights, "curve": curve.values, "after": whole_weights(classifier)})
    return results


class Before(Callback):
    """The weights before the first step."""

    weights: dict[str, torch.Tensor]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights = whole_weights(pl_module)


def fitted_to(
    step: int, root: Path, folder: Path, resumed: str | None, spread: bool = True, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train up to a step, perhaps from a checkpoint on, and leave one there: two epochs of six steps are the whole."""
    warnings.filterwarnings("ignore")
    classifier, curve = small_classifier(**(options or {})), Curve()
    stop = StopOnSignal()
    callbacks = [curve, stop, LastCheckpoint(folder, every_n_steps=1000, stop=stop), SeedEachStep(), StopAt(step)]
    torch.manual_seed(0)
    trainer = small_trainer(*callbacks, max_epochs=2, **(sharded() if spread else {}))
    data = small_data(root, tokenizer=classifier.hparams["backbone"], layout="tree", token_budget=160)
    with contextlib.suppress(Interrupted):
        trainer.fit(classifier, data, ckpt_path=resumed, weights_only=True)
    return {"curve": curve.values, "after": whole_weights(classifier), "temperature": classifier.temperature}


class StopAt(Callback):
    """Asks one rank alone to stop."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step + 1 == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def killed_while_saving(root: Path, folder: Path, when: str) -> None:
    """Save once, take a step, and die in the middle of the next save."""
    warnings.filterwarnings("ignore")
    classifier = small_classifier()
    options = {"max_steps": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    trainer = small_trainer(LastCheckpoint(folder, every_n_steps=1), **sharded(**options))
    saved = 0

    def die_at(name: str, original: Any) -> Any:
        def instead(*arguments: Any, **given: Any) -> Any:
            nonlocal saved
            saved += name == "write_shards"
            if saved > 2 and name == when:  # weights and optimizer are two calls a save
                if when == "put_in_place":
                    arguments[1].rename(writing._replaced(arguments[1]))  # half of it
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **given)

        return instead

    for module, name in ((shards, "write_shards"), (fully_sharded, "put_in_place")):
        setattr(module, name, die_at(name, getattr(module, name)))
    trainer.fit(classifier, small_data(root), weights_only=True)


def disk_full_on_one_rank(root: Path, folder: Path) -> list[str]:
    """Save once, take a step, and find no room on rank 1 for the next save: what each rank then says."""
    warnings.filterwarnings("ignore")

    class Full(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1 and trainer.global_rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    options = {"max_steps": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    trainer = small_trainer(LastCheckpoint(folder, every_n_steps=1), Full(), **sharded(**options))
    said: list[Any] = [None] * trainer.world_size
    try:
        trainer.fit(small_classifier(), small_data(root), weights_only=True)
        mine = "nothing"
    except UserError as error:
        mine = error.what
    torch.distributed.all_gather_object(said, mine)
    return said


def mixed_precision(root: Path) -> dict[str, Any]:
    """A step in bf16-mixed: in which types masters, gradients, the optimizer's state and a block's output are."""
    warnings.filterwarnings("ignore")
    classifier, curve = small_classifier(), Curve()
    types: dict[str, str] = {}

    class Types(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            block = blocks(pl_module.network)[0]
            block.register_forward_hook(lambda module, inputs, output: types.update(states=str(output.dtype)))

        def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
            weight = next(iter(classifier.parameters()))
            assert weight.grad is not None
            types.update(master=str(weight.dtype), gradient=str(weight.grad.dtype))

        def on_train_end(self, trainer: Trainer, *args: Any) -> None:
            state = next(iter(trainer.optimizers[0].state.values()))
            types.update(optimizer=str(state["exp_avg"].dtype))

    fit(classifier, small_data(root, layout="tree"), curve, Types(), **STEP, **sharded(precision="bf16-mixed"))
    return {"types": types, "curve": curve.values, "layout": classifier.trainer.datamodule.layout}


def compiled(root: Path) -> list[Any]:
    """A step with blocks that are traced as for the compiler, which itself takes long and is not ours to test."""
    plain = torch.nn.Module.compile
    torch.nn.Module.compile = partialmethod(plain, backend="eager")  # type: ignore[method-assign, assignment]
    return steps(root, [("llama", {"compile": True}, {"layout": "tree", "token_budget": 160})])


def stored_in_bfloat16(root: Path, spread: bool) -> dict[str, Any]:
    """Two steps with weights in bfloat16: the curve, and the types of weights, gradients and buffers."""
    warnings.filterwarnings("ignore")
    classifier, curve = small_classifier(scratch=LLAMA, optimizer="adamw_8bit", dtype="bfloat16"), Curve()
    types: dict[str, str] = {}

    class Types(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
            weight = next(iter(classifier.parameters()))
            assert weight.grad is not None
            assert classifier.network is not None
            rotary = next(buffer for name, buffer in classifier.network.named_buffers() if "inv_freq" in name)
            types.update(weight=str(weight.dtype), gradient=str(weight.grad.dtype), rotary=str(rotary.dtype))

    options = {"max_steps": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0, "precision": "bf16-true"}
    fit(classifier, small_data(root, layout="tree"), curve, Types(), **options, **(sharded() if spread else {}))
    return {"types": types, "curve": curve.values, "layout": classifier.trainer.datamodule.layout}
