"""BackboneModule: loss, gradients, schedule, optimizers, and steps that are not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.saving import LastCheckpoint
from datamodules.corpus.records import Category
from datamodules.errors import UserError
from models.learning.checkpoint_files import load_checkpoint
from models.learning.reward_classifier import RewardClassifier
from tests.models.learning.test_reward_classifier import WEIGHTS
from tests.models.small import (
    TRAIN_ROWS_A_STEP,
    all_finite,
    fit,
    small_classifier,
    small_data,
)


class Ledger(Callback):
    """Computes each step's loss by hand, and stores it with the logged one."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.weight = torch.tensor([(weights or {}).get(category.value, 1.0) for category in Category])
        self.rows: list[float] = []
        self.by_hand: list[float] = []
        self.logged: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for micro_batch in batch:
            with torch.no_grad():
                logits = pl_module(micro_batch["inputs"])
            for row, label, category in zip(logits, micro_batch["label"], micro_batch["category"], strict=True):
                loss = -torch.log_softmax(row, 0)[label] * self.weight[category]
                self.rows.append(float(loss))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.by_hand.append(sum(self.rows) / len(self.rows))
        self.logged.append(float(trainer.callback_metrics["train/loss"]))
        self.rates.append(float(trainer.callback_metrics["train/learning_rate"]))
        self.rows = []


class Gradients(Callback):
    """Stores the gradients of the first step."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not self.first:
            self.first = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


class Spoil(Callback):
    """Sets one weight to NaN, in the middle of the step after `step`."""

    def __init__(self, what: str, step: int = 0) -> None:
        self.what = what
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.what == "the loss" and trainer.global_step == self.step:
            self._spoil(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.what == "the gradient norm" and trainer.global_step == self.step:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            gradient.view(-1)[0] = float("inf")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.what == "validation" and not trainer.sanity_checking:
            self._spoil(pl_module)

    @staticmethod
    def _spoil(pl_module: LightningModule) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).fill_(float("nan"))


class Blow(Callback):
    """Makes the learning rate of one step far too large, so that the weights are finite but useless."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            trainer.optimizers[0].param_groups[0]["lr"] = 1e30


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "category weights"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_each_steps_loss_is_the_mean_cross_entropy_of_its_rows(
    root: Path, weights: dict[str, float] | None, micro_batch_size: int
) -> None:
    """Also in the short last step of an epoch, and for any division into micro-batches."""
    ledger = Ledger(weights)
    data = small_data(root, micro_batch_size=micro_batch_size)
    fit(small_classifier(category_weights=weights), data, ledger, num_sanity_val_steps=0)
    assert len(data.split.train) % TRAIN_ROWS_A_STEP, "the last step is short"
    assert len(ledger.logged) == -(-len(data.split.train) // TRAIN_ROWS_A_STEP)
    assert ledger.logged == pytest.approx(ledger.by_hand, rel=1e-4)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "category weights"])
def test_accumulated_micro_batches_train_like_one_large_batch(root: Path, weights: dict[str, float] | None) -> None:
    runs = []
    for micro_batch_size in (1, 2, TRAIN_ROWS_A_STEP):
        gradients, ledger = Gradients(), Ledger(weights)
        data = small_data(root, micro_batch_size=micro_batch_size)
        fit(small_classifier(category_weights=weights), data, gradients, ledger)
        runs.append((gradients.first, ledger.logged))
    for first, logged in runs[:-1]:
        assert first.keys() == runs[-1][0].keys()
        for name, gradient in first.items():
            torch.testing.assert_close(gradient, runs[-1][0][name], atol=1e-6, rtol=1e-3)
        assert logged == pytest.approx(runs[-1][1], rel=2e-3)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradient_checkpointing_changes_no_gradient(root: Path, family: str) -> None:
    """With dropout: a recomputation must drop the same values."""
    found = []
    for on in (False, True):
        gradients = Gradients()
        classifier = small_classifier(family, gradient_checkpointing=on, dropout=0.2)
        fit(classifier, small_data(root), gradients, max_steps=1, num_sanity_val_steps=0, limit_val_batches=0)
        assert classifier.network is not None
        assert classifier.network.is_gradient_checkpointing == on
        found.append(gradients.first)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_the_learning_rate_follows_the_schedule_over_the_whole_run(root: Path) -> None:
    ledger = Ledger()
    fit(small_classifier(warmup_ratio=0.25), small_data(root), ledger, max_epochs=2, limit_val_batches=0)
    steps = len(ledger.rates)
    warm = round(0.25 * steps)
    expected = [step / warm if step < warm else (steps - step) / (steps - warm) for step in range(steps)]
    assert ledger.rates == pytest.approx([1e-2 * rate for rate in expected], rel=1e-6)


def test_gradients_are_clipped_to_their_norm(root: Path) -> None:
    """The gradient of the whole step is clipped. The logged norm is that before clipping."""
    norms = []

    class Norm(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            norms.append(float(trainer.callback_metrics["train/gradient_norm"]))

    clipped = {}
    for greatest in (None, 1e-3):
        classifier = small_classifier(gradient_clip_norm=greatest)
        clip = classifier.on_before_optimizer_step

        def keep(optimizer: torch.optim.Optimizer, clip: Any = clip, classifier: Any = classifier) -> None:
            clip(optimizer)
            clipped[classifier.hparams["gradient_clip_norm"]] = torch.cat(
                [p.grad.flatten() for p in classifier.parameters()]
            )

        classifier.on_before_optimizer_step = keep  # type: ignore[method-assign]
        fit(classifier, small_data(root), Norm(), max_steps=1, num_sanity_val_steps=0, limit_val_batches=0)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) == pytest.approx(float(clipped[None].norm()), rel=1e-5)
    torch.testing.assert_close(clipped[1e-3], clipped[None] * 1e-3 / norms[0], atol=1e-9, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_optimizer_trains_in_every_precision_and_with_clipped_gradients(
    root: Path, optimizer: str, precision: Any
) -> None:
    """configs/reward/paper.yaml asks for bf16-mixed, gradient clipping and adamw at once."""
    classifier = small_classifier(optimizer=optimizer)
    ledger = Ledger()
    fit(classifier, small_data(root), ledger, precision=precision, max_steps=3, limit_val_batches=0)
    assert len(ledger.logged) == 3
    assert classifier.network is not None
    assert all_finite(classifier.network.state_dict())


def test_a_run_without_an_end_gives_a_user_error(root: Path) -> None:
    with pytest.raises(UserError, match="without an end"):
        fit(small_classifier(), small_data(root), max_epochs=-1)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_warmup_ratio_is_a_fraction(ratio: float) -> None:
    with pytest.raises(UserError, match=r"model\.warmup_ratio"):
        RewardClassifier(warmup_ratio=ratio)


@pytest.mark.parametrize("what", ["the loss", "the gradient norm"])
def test_a_step_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(
    root: Path, tmp_path: Path, what: str
) -> None:
    with pytest.raises(UserError, match=f"{what} is (nan|inf) at step 4; the last good checkpoint is kept") as error:
        fit(small_classifier(), small_data(root), Spoil(what, step=4), LastCheckpoint(tmp_path, 2))
    assert "learning_rate" in error.value.hint
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["global_step"] == 4
    assert all_finite(checkpoint["state_dict"])


def test_a_validation_that_is_not_finite_stops_the_run_too(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nan"):
        fit(small_classifier(), small_data(root), Spoil("validation"), LastCheckpoint(tmp_path, 2))
    assert all_finite(load_checkpoint(tmp_path / "last.ckpt")["state_dict"])


def test_a_good_checkpoint_remains_if_a_step_spoils_the_weights_before_the_loss_shows_it(
    root: Path, tmp_path: Path
) -> None:
    """The step that spoils the weights is saved before the next one finds the loss not finite."""
    with pytest.raises(UserError, match="last good checkpoint is kept"):
        fit(small_classifier(), small_data(root), Blow(), LastCheckpoint(tmp_path, 1))
    checkpoints = [load_checkpoint(path) for path in tmp_path.glob("*.ckpt")]
    greatest = [max(float(w.abs().max()) for w in found["state_dict"].values()) for found in checkpoints]
    assert any(weight < 100 for weight in greatest), greatest


def test_rows_longer_than_the_backbones_positions_give_a_user_error(root: Path) -> None:
    """data.max_length is 1024 unless set, and a BERT has 512 positions."""
    scratch = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    classifier = small_classifier(scratch={**scratch, "intermediate_size": 16, "max_position_embeddings": 64})
    with pytest.raises(UserError, match="max_length"):
        fit(classifier, small_data(root))
