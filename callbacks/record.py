"""What a run found out, as one plain mapping: the content of metrics.json, of the model card and of the report."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.files import METRICS_FILE, write_atomically
from callbacks.shards import content_digest
from datamodules.rows import RowsDataModule
from models.metrics import PUBLISHED_REWARD_ROWS
from models.training import BackboneModule

RECORDED_PACKAGES = (
    "proactive",
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "datasets",
    "tokenizers",
)


def run_record(model: BackboneModule, data: RowsDataModule, source: str) -> dict[str, Any]:
    """The figures of a tested model, with all that is needed to read them.

    Args:
        model: A model that has been tested.
        data: What it was tested on.
        source: Which weights were tested.
    """
    found = data.contamination
    return {
        "task": model.task,
        "weights": source,
        "backbone": model.hparams["backbone"],
        "split": data.description,
        "rows": data.row_counts,
        "truncated_rows": dict(data.truncated),
        "contamination": {
            "test_rows": found.test_rows,
            "contaminated_rows": found.contaminated_rows,
            "fraction": found.fraction,
            "allowed": data.contamination_allowed,
        },
        "temperature": model.temperature,
        "threshold": model.threshold,
        "test": model.test_figures,
        "published": PUBLISHED_REWARD_ROWS if model.task == "reward" else {},
        "versions": versions(),
    }


class MetricsFile(Callback):
    """Writes metrics.json when the test has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            record = tested_record(trainer, pl_module)
            write_atomically(self.folder / METRICS_FILE, json.dumps(record, indent=2) + "\n")


def tested_record(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The record of the test that `trainer` has just run, with a digest of the checkpoint that it tested, if any."""
    assert isinstance(pl_module, BackboneModule)
    data = trainer.datamodule  # type: ignore[attr-defined]
    path = trainer.ckpt_path
    digest = content_digest(Path(path)) if path else None
    return run_record(pl_module, data, str(path or "in memory")) | {"weights_digest": digest}


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    packages = {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES}
    return {"python": platform.python_version(), **packages}
