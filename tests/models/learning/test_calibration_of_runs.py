"""When a run fits its calibration, and on which rows."""

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.saving import BestCheckpoint, LastCheckpoint
from callbacks.stopping import Interrupted, StopOnSignal
from models.learning.calibration import Calibration, calibrated, fit_temperature, fit_threshold
from models.learning.checkpoint_files import load_checkpoint
from models.learning.reward_classifier import RewardClassifier
from models.learning.saved_models import export_weights, model_from_checkpoint, model_from_export
from tests.helpers import SignalAtStep
from tests.models.learning.test_reward_classifier import CountValidations, Fitted, fitted  # noqa: F401
from tests.models.small import (
    fit,
    probabilities,
    small_classifier,
    small_data,
    small_trainer,
)


def test_temperature_and_threshold_are_fitted_on_the_validation_rows(fitted: Fitted) -> None:  # noqa: F811
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


def test_validate_without_fit_works_in_inference_mode(fitted: Fitted) -> None:  # noqa: F811
    """`Trainer.validate` records no gradients, but a temperature is fitted there too."""
    _, data, path = fitted
    classifier = model_from_checkpoint(RewardClassifier, load_checkpoint(path))
    stored = classifier.temperature
    small_trainer().validate(classifier, data, verbose=False)
    assert classifier.temperature == pytest.approx(stored, rel=1e-3)
