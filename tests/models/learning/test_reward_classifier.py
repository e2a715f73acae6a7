"""RewardClassifier: its loss, values that stop a run, its calibration, checkpoints and exports."""

import json
import logging
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from callbacks.saving import BestCheckpoint, LastCheckpoint
from callbacks.stopping import Interrupted, StopOnSignal
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.steps import RewardBatch
from datamodules.corpus.records import Category
from datamodules.errors import UserError
from datamodules.prompting.templates import render
from datamodules.prompting.tokenizers import train_tokenizer
from models.learning.calibration import Calibration, calibrated, fit_temperature, fit_threshold
from models.learning.checkpoint_files import load_checkpoint
from models.learning.reward_classifier import RewardClassifier
from models.learning.saved_models import export_weights, model_from_checkpoint, model_from_export
from tests.helpers import SignalAtStep
from tests.models.small import (
    TRAIN_ROWS_A_STEP,
    all_finite,
    fit,
    probabilities,
    small_classifier,
    small_data,
    small_trainer,
)

Fitted = tuple[RewardClassifier, RewardDataModule, Path]
WEIGHTS = {"missed_need": 2.0, "false_alarm": 0.25}


class CountValidations(Callback):
    """Counts validations, without the sanity check."""

    count = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.count += not trainer.sanity_checking


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


@pytest.fixture(scope="module")
def fitted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A classifier after two epochs, its data, and its checkpoint."""
    folder = tmp_path_factory.mktemp("fitted")
    classifier, data = small_classifier(category_weights=WEIGHTS), small_data(root)
    fit(classifier, data, LastCheckpoint(folder), max_epochs=2)
    classifier.eval()
    return classifier, data, folder / "last.ckpt"


def first_test_batch(data: RewardDataModule) -> RewardBatch:
    return next(iter(data.test_dataloader()))[0]


def test_no_weights_before_configure_model(fitted: Fitted) -> None:
    assert list(RewardClassifier(backbone="no/such-model").parameters()) == []
    classifier = fitted[0]
    network = classifier.network
    classifier.configure_model()
    assert classifier.network is network, "made once"


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
def test_a_warmup_ratio_is_a_share(ratio: float) -> None:
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


def test_temperature_and_threshold_are_fitted_on_the_validation_rows(fitted: Fitted) -> None:
    classifier, data, path = fitted
    batches = [micro_batch for step in data.val_dataloader() for micro_batch in step]
    probability = torch.cat([probabilities(classifier, batch) for batch in batches])
    target = torch.cat([batch["label"] for batch in batches])
    assert len(target) == len(data.split.validation)
    temperature = fit_temperature(probability, target)
    found = classifier.calibration
    assert found is not None
    assert found.temperature == pytest.approx(temperature, rel=1e-3)
    assert found.f1_threshold == pytest.approx(fit_threshold(calibrated(probability, temperature), target), rel=1e-3)
    assert (found.temperature, found.f1_threshold) != (1.0, 0.5)
    assert found.rows == found.of_rows == len(target)
    assert load_checkpoint(path)["calibration"] == asdict(found)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 2},
        {"max_steps": 2, "num_sanity_val_steps": 0},
        {"max_time": "00:00:00:00", "min_steps": 2, "max_epochs": 1000},
        {"max_epochs": 1, "check_val_every_n_epoch": None, "val_check_interval": 1000},
    ],
    ids=["max_steps", "no sanity check", "max_time", "validation is too far off"],
)
def test_a_run_that_ends_before_its_first_validation_validates_at_its_end(
    root: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    classifier, data = small_classifier(), small_data(root)
    best, validations = BestCheckpoint(tmp_path, "validation/auroc"), CountValidations()
    trainer = fit(classifier, data, best, LastCheckpoint(tmp_path), validations, **options)
    assert validations.count == 1
    assert classifier.calibration is not None
    assert classifier.calibration.rows == classifier.calibration.of_rows == len(data.split.validation)
    for name in ("best", "last"):
        checkpoint = load_checkpoint(tmp_path / f"{name}.ckpt")
        assert checkpoint["calibration"] == asdict(classifier.calibration)
        assert checkpoint["global_step"] == trainer.global_step


def test_a_run_that_has_validated_does_not_validate_again_at_its_end(root: Path) -> None:
    validations = CountValidations()
    trainer = fit(small_classifier(), small_data(root), validations, max_steps=8, max_epochs=5)
    assert (trainer.global_step, validations.count) == (8, 1)


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}, {"max_steps": 0}])
def test_a_run_without_validation_is_not_calibrated(root: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """A sanity check before training fits no calibration."""
    classifier, data = small_classifier(), small_data(root)
    trainer = fit(classifier, data, LastCheckpoint(tmp_path), max_epochs=1, **options)
    assert classifier.calibration is None
    if trainer.global_step:
        assert load_checkpoint(tmp_path / "last.ckpt")["calibration"] is None
    trainer.test(classifier, data, verbose=False)
    assert set(classifier.test_metrics) == {"raw"}
    torch.testing.assert_close(classifier.test_rows["calibrated"], classifier.test_rows["probability"])
    export_weights(classifier, tmp_path / "export", data.state_dict())
    assert json.loads((tmp_path / "export" / "proactive.json").read_text())["calibration"] is None
    assert model_from_export(RewardClassifier, tmp_path / "export")[0].calibration is None


def test_a_run_that_is_stopped_before_its_first_validation_is_not_calibrated(root: Path, tmp_path: Path) -> None:
    classifier, stop = small_classifier(), StopOnSignal()
    callbacks = (stop, SignalAtStep(2, signal.SIGINT), LastCheckpoint(tmp_path, stop=stop))
    with pytest.raises(Interrupted):
        fit(classifier, small_data(root), *callbacks)
    assert load_checkpoint(tmp_path / "last.ckpt")["calibration"] is None


def test_a_calibration_on_a_part_of_the_validation_rows_is_marked(root: Path) -> None:
    classifier, data = small_classifier(), small_data(root)
    fit(classifier, data, limit_val_batches=1)
    assert classifier.calibration is not None
    assert 0 < (classifier.calibration.rows or 0) < len(data.split.validation) == classifier.calibration.of_rows


def test_the_calibration_of_an_older_checkpoint_is_read() -> None:
    assert Calibration.of({"temperature": 2.0, "threshold": 0.3}) == Calibration(2.0, 0.3, None, None)


def test_validate_without_fit_works_in_inference_mode(fitted: Fitted) -> None:
    """`Trainer.validate` records no gradients, but a temperature is fitted there too."""
    _, data, path = fitted
    classifier = model_from_checkpoint(RewardClassifier, load_checkpoint(path))
    stored = classifier.temperature
    small_trainer().validate(classifier, data, verbose=False)
    assert classifier.temperature == pytest.approx(stored, rel=1e-3)


def test_a_test_reports_raw_and_calibrated_metrics_of_all_rows(fitted: Fitted) -> None:
    _, data, path = fitted
    classifier = model_from_checkpoint(RewardClassifier, load_checkpoint(path))
    stored = classifier.calibration
    assert stored is not None
    trainer = small_trainer()
    trainer.test(classifier, data, verbose=False)
    assert classifier.calibration == stored, "fitted on validation rows alone"
    rows = classifier.test_rows
    order = rows["row"].argsort()
    assert rows["row"][order].tolist() == list(range(len(data.split.test)))
    assert rows["target"][order].tolist() == [row.accepted for row in data.split.test]
    assert rows["category"][order].tolist() == [row.category.number for row in data.split.test]
    torch.testing.assert_close(rows["calibrated"], calibrated(rows["probability"], stored.temperature))
    readings = {
        "raw": rows["probability"] > 0.5,
        "calibrated": rows["calibrated"] > 0.5,
        "f1_optimal": rows["calibrated"] > stored.f1_threshold,
    }
    assert set(classifier.test_metrics) == set(readings)
    for name, decided in readings.items():
        figures = classifier.test_metrics[name]
        assert figures["acceptance_rate"] == pytest.approx(float(decided.double().mean()))
        assert figures["people_acceptance_rate"] == pytest.approx(float(rows["target"].double().mean()))
        right = float((decided == rows["target"].bool()).double().mean())
        assert figures["accuracy"] == pytest.approx(right, abs=1e-6)
        assert figures["accuracy_low"] <= right + 1e-6
        assert figures["accuracy_high"] >= right - 1e-6
        assert {"f1_low", "f1_high", "auroc", "calibration_error"} < set(figures)
        assert float(trainer.callback_metrics[f"test/{name}_accuracy"]) == pytest.approx(right, abs=1e-6)


def test_rows_that_only_fill_a_batch_are_not_counted(fitted: Fitted) -> None:
    classifier, data, _ = fitted
    batch = first_test_batch(data)
    classifier.metrics.reset()
    classifier.test_step([{**batch, "weight": torch.tensor([1.0, 0.0])}], 0)  # type: ignore[typeddict-item]
    assert classifier.metrics.rows()["row"].tolist() == batch["row"][:1].tolist()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt2", {"pooling": "mean"}),
        ("bert", {}),
        ("roberta", {"pooling": "cls"}),
        ("deberta-v2", {}),
        ("llama", {"dtype": "bfloat16", "attn_implementation": "eager", "gradient_checkpointing": True}),
    ],
    ids=["llama", "gpt2 mean", "bert", "roberta cls", "deberta-v2", "llama bfloat16"],
)
def test_checkpoint_and_export_give_the_same_probabilities(
    root: Path, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """Bit-identical, and without the backbone's files."""
    classifier, data = small_classifier(family, **options), small_data(root)
    fit(classifier, data, LastCheckpoint(tmp_path))
    batch = list(data.test_dataloader())[-1][0]
    expected = probabilities(classifier, batch)
    if options.get("dtype") != "bfloat16":  # which may give two rows the same one
        assert expected.min() < expected.max()

    loaded = model_from_checkpoint(RewardClassifier, load_checkpoint(tmp_path / "last.ckpt"))
    export_weights(classifier, tmp_path / "export", data.state_dict())
    exported, state = model_from_export(RewardClassifier, tmp_path / "export")
    assert state == json.loads(json.dumps(data.state_dict()))
    for other in (loaded, exported):
        assert torch.equal(probabilities(other, batch), expected)
        assert other.calibration == classifier.calibration is not None
        assert dict(other.hparams) == dict(classifier.hparams)
        assert other.network is not None
        assert classifier.network is not None
        assert {p.dtype for p in other.network.parameters()} == {p.dtype for p in classifier.network.parameters()}


def test_tested_weights_use_their_own_calibration(fitted: Fitted) -> None:
    """The best weights are tested by a module that was trained and calibrated further."""
    _, data, path = fitted
    stored = load_checkpoint(path)["calibration"]
    classifier = model_from_checkpoint(RewardClassifier, load_checkpoint(path))
    classifier.calibration = Calibration(stored["temperature"] / 3, 0.9, 1, 1)
    small_trainer().test(classifier, data, ckpt_path=str(path), weights_only=True, verbose=False)
    assert classifier.calibration == Calibration(**stored)
    rows = classifier.test_rows
    torch.testing.assert_close(rows["calibrated"], calibrated(rows["probability"], stored["temperature"]))


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"model": {"no_such_option": 1}}'])
def test_a_folder_that_is_not_an_export_gives_a_user_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "proactive.json").write_text(content)
    with pytest.raises(UserError, match=r"proactive\.json"):
        model_from_export(RewardClassifier, tmp_path)


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_that_ends_in_the_padding_token_is_read_as_the_exported_model_reads_it(
    family: str, layout: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many decoders pad with their end token, and chat prompts end with it once or twice."""
    texts = ["Events:", "Offer: accepted?", "- The user opens a file."]
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts = {"event": "- {event}\n<eos>", "proposal": "Offer: {proposal}<eos><eos>", "no_proposal": "No offer?<eos>"}
    (tmp_path / "prompt.yaml").write_text(json.dumps({"instructions": "Events:\n", **parts}))
    options = {"prompt": str(tmp_path / "prompt.yaml"), "tokenizer": str(tmp_path / "tokenizer")}
    data = small_data(root, layout=layout, max_length=400, token_budget=800, **options)
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("proactive"), "info", said.append)
    classifier = small_classifier(family)
    fit(classifier, data, max_steps=2)
    train = len(data.split.train)
    assert [text for text in said if "which is also the padding token" in text] == [
        f"data.prompt: {train} of {train} train rows end in <eos>, which is also the padding token; the classifier "
        "reads the token before it, as in transformers"
    ]
    assert data.layout == layout
    assert classifier.network is not None
    data.tokenizer.save_pretrained(tmp_path / "export")
    export_weights(classifier, tmp_path / "export", data.state_dict())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    segmenter = data.segmenter
    (batch, *_), rows = next(iter(data.test_dataloader())), data.rows("test")
    found = probabilities(classifier, batch)
    prompts = []
    for row in batch["row"].tolist():
        segments = segmenter.encode(render(data.template, rows[row]))
        prompts.append([*segmenter.prefix, *(token for segment in segments for token in segment), *segmenter.suffix])
    assert all(prompt[-1] == tokenizer.pad_token_id for prompt in prompts)
    with torch.no_grad():
        alone = torch.cat([plain(input_ids=torch.tensor([prompt])).logits for prompt in prompts])
        padded = plain(**data.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")).logits
    for logits in (alone, padded):
        torch.testing.assert_close(logits.double().softmax(-1)[:, 1], found, atol=1e-5, rtol=1e-5)
