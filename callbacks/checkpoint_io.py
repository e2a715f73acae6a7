"""Writes checkpoints atomically and loads them without running code."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from datamodules.files.writing import Unfinished, put_in_place, sync
from models.learning.checkpoint_files import load_run
from models.learning.training import BackboneModule


class SafeCheckpointIO(TorchCheckpointIO):
    """Saves atomically, loads with weights_only, and raises a UserError for a damaged file.

    Args:
        kind: The class of the model.
    """

    def __init__(self, kind: type[BackboneModule]) -> None:
        super().__init__()
        self.kind = kind

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        with Unfinished(target) as unfinished:
            with unfinished.path.open("wb") as file:
                torch.save(checkpoint, file)
                sync(file)
            put_in_place(unfinished.path, target)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_run(Path(path), self.kind)
