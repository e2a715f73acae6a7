"""When a run started, how long it trained, on which device, and with which options."""

import platform
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.files.run_folders import REPORT_FILE, holds_folds

RUN_TIME = "run_time"  # key of start and duration in a checkpoint


class RunFacts(Callback):
    """Collects what the report states about a run besides its metrics.

    The time of training is the sum over all parts of a resumed run, validations included, without the test. Of a killed
    part it counts until the last checkpoint.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: dict[str, Any] = {}  # those that differ from the defaults, by name
        self._started = ""
        self._seconds = 0.0
        self._since: float | None = None
        self._device = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._started or datetime.now(UTC).isoformat(timespec="seconds")
        self._since = time.monotonic()
        self._device = device_name(trainer.strategy.root_device, trainer.world_size)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds, self._since = self._trained, None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RUN_TIME] = {"started": self._started, "seconds": self._trained}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and (saved := checkpoint.get(RUN_TIME)):  # the test loads the best weights
            self._started, self._seconds = saved["started"], saved["seconds"]

    @property
    def _trained(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def record(self) -> dict[str, Any]:
        """The entry `run` of metrics.json. `seconds` is the time of training; `pooled` the report of all folds."""
        of_folds = self.folder.parents[1] if holds_folds(self.folder.parents[1]) else None
        others = (of_folds or self.folder).parent
        return {
            "started": self._started,
            "seconds": round(self._trained, 1),
            "device": self._device,
            "options": self.options,
            "compare": f"python -m proactive.compare {shlex.quote(str(others))}/*",
            "pooled": f"../../{REPORT_FILE}" if of_folds else None,
        }


def device_name(device: torch.device, ranks: int) -> str:
    """The device of a rank in words, with the number of ranks if there are several."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type.upper()} {platform.machine()}, {torch.get_num_threads()} threads"
    return name if ranks == 1 else f"{ranks} x {name}"
