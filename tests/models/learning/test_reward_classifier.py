"""RewardClassifier: its loss, values that stop a run, its calibration, checkpoints and exports."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForSequenceClassification

from callbacks.saving import LastCheckpoint
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.steps import RewardBatch
from datamodules.errors import UserError
from datamodules.prompting.templates import render
from datamodules.prompting.tokenizers import train_tokenizer
from models.learning.calibration import Calibration, calibrated
from models.learning.checkpoint_files import load_checkpoint
from models.learning.reward_classifier import RewardClassifier
from models.learning.saved_models import export_weights, model_from_checkpoint, model_from_export
from tests.models.small import (
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
    classifier.evaluated.reset()
    classifier.test_step([{**batch, "weight": torch.tensor([1.0, 0.0])}], 0)  # type: ignore[typeddict-item]
    assert classifier.evaluated.rows()["row"].tolist() == batch["row"][:1].tolist()


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
