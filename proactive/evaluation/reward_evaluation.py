"""The test of a reward classifier."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar

from callbacks.progress import progress_callback
from callbacks.stopping import Interrupted, StopOnSignal
from datamodules.batching.reward_rows import RewardDataModule
from models.learning.checkpoint_files import load_trained
from models.learning.reward_classifier import RewardClassifier
from models.reporting.run_record import tested_record

log = logging.getLogger("proactive")


def evaluate_reward(checkpoint: Path, data: Mapping[str, Any], quiet: bool = False) -> dict[str, Any]:
    """Test a reward classifier.

    Args:
        checkpoint: A run folder (its best weights), a .ckpt file, or an export folder.
        data: The fields of `DataOptions`; None for the option of its training.
        quiet: Whether to show no progress bar.

    Returns:
        The record of the test, as in a run's metrics.json.

    Raises:
        UserError: The checkpoint or the data cannot be read, or an option is not valid.
        SystemExit: A signal has ended the test. The exit code is the shell's, 128 + the signal's number.
    """
    classifier, state, source = load_trained((RewardClassifier,), checkpoint, "--checkpoint")
    module = RewardDataModule.from_state(state, **data)
    if data["split"] is None and module.root != state["hyperparameters"]["root"]:
        log.info(
            f"data.split: the rows of {module.root} are divided as in training, and only its test rows are tested; "
            "--data.split all tests all of them"
        )
    progress = progress_callback(quiet)
    trainer = Trainer(
        logger=False,
        callbacks=[StopOnSignal(), *([progress] if progress else [])],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=isinstance(progress, ProgressBar),
        enable_checkpointing=False,
        devices=1,
    )
    try:
        with torch.random.fork_rng(devices=[]):  # a test draws from the CPU's generator only
            trainer.test(classifier, module, verbose=False)
    except Interrupted as stop:
        raise SystemExit(128 + stop.signal_number) from None
    return tested_record(trainer, classifier) | {"weights": str(source)}
