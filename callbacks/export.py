"""The weights as other tools load them: safetensors, tokenizer and a model card in one folder."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.files import EXPORT
from callbacks.record import tested_record
from datamodules.rows import RowsDataModule
from models.sharding import gather
from models.training import BackboneModule

TEMPLATES = Path(__file__).with_name("templates")


class ExportModel(Callback):
    """Writes `export/` when the test has ended, whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, BackboneModule)
        assert pl_module.network is not None
        weights = gather(pl_module.network)  # all ranks take part
        if trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            record = tested_record(trainer, pl_module)
            export_model(pl_module, data, record, self.folder / EXPORT, weights)


def export_model(
    model: BackboneModule,
    data: RowsDataModule,
    record: dict[str, Any] | None,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights, configuration, tokenizer and model card to `folder`, in place of what was there.

    Args:
        model: What to export.
        data: What it was trained on.
        record: What its test found out; without one there is no model card.
        folder: Where to.
        weights: See `BackboneModule.export`.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.export(unfinished, data.state_dict(), weights)
    data.tokenizer.save_pretrained(unfinished)
    if record is not None:
        (unfinished / "README.md").write_text(model_card(record, model.hparams), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def model_card(record: dict[str, Any], options: Mapping[str, Any]) -> str:
    """A model card in the form that model hubs read, made of a run's record and the model's options."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown, made of figures and of the run's own options
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{record['task']}_card.md").render(record=record, options=options)
