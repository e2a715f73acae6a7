"""Trackers: where a run logs besides its own files. They use no network unless an environment variable says so."""

import importlib
import logging
import os
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from datamodules.errors import UserError
from datamodules.files.run_folders import LOGS

TrackerName = Literal["none", "tensorboard", "wandb", "mlflow"]
PROJECT = "proactive"
MODULES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}  # of the extra `trackers`
# Trackers send nothing to their makers, and W&B works offline, unless the user has set these variables.
DEFAULTS = {
    "wandb": {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"},
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY": "true"},
}


def tracker_of(name: TrackerName, folder: Path) -> list[Logger]:
    """The loggers of a tracker.

    Args:
        name: The tracker.
        folder: The run folder, ROOT/NAME/NUMBER. The tracker calls the run NAME/NUMBER.

    Returns:
        No logger or one.

    Raises:
        UserError: The tracker's library is not installed.
    """
    for module in MODULES.get(name, ()):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"run.tracker: {name} needs {module}, which is not installed ({error})",
                "Install the extra: pip install 'proactive[trackers]'.",
            ) from error
    for variable, value in DEFAULTS.get(name, {}).items():
        os.environ.setdefault(variable, value)
    run = f"{folder.parent.name}/{folder.name}"
    if name == "tensorboard":
        return [TensorBoardLogger(folder, "", LOGS)]
    if name == "wandb":
        return [_wandb(run, folder)]
    return [_mlflow(run, folder.parent.parent)] if name == "mlflow" else []


def _wandb(run: str, folder: Path) -> Logger:
    """Metrics and hyperparameters only: no source code, command line, console output, or data about the machine."""
    import wandb

    off = ("disable_git", "disable_code", "x_disable_meta", "x_disable_machine_info", "x_disable_stats")
    settings = wandb.Settings(**dict.fromkeys(off, True), console="off", silent=True, x_save_requirements=False)
    place = folder / LOGS
    place.mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(run, place, project=PROJECT, group=run, settings=settings)
    logger._wandb_init.pop("anonymous", None)  # Lightning passes this deprecated option, and W&B warns about it
    return logger


def _mlflow(run: str, root: Path) -> Logger:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').resolve()}"
    return MLFlowLogger(PROJECT, run, store)
