"""The weights as other tools load them: safetensors, tokenizer and a model card in one folder."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from callbacks.files import EXPORT
from callbacks.record import tested_record
from datamodules.rows import RowsDataModule
from models.training import BackboneModule

TEMPLATES = Path(__file__).with_name("templates")


class ExportModel(Callback):
    """Writes `export/` when the test has ended, whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, BackboneModule)
            data = trainer.datamodule  # type: ignore[attr-defined]
            export_model(pl_module, data, tested_record(trainer, pl_module), self.folder / EXPORT)


def export_model(model: BackboneModule, data: RowsDataModule, record: dict[str, Any], folder: Path) -> None:
    """Write weights, configuration, tokenizer and model card to `folder`, in place of what was there."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.export(unfinished, data.state_dict())
    data.tokenizer.save_pretrained(unfinished)
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
