"""The weights as other tools load them: safetensors, tokenizer and a model card in one folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.batching.rows import RowsDataModule
from datamodules.errors import UserError
from datamodules.files.writing import Unfinished
from models.learning.saved_models import EXPORT_STATE, export_state, export_weights
from models.learning.sharded_files import put_in_place, recover
from models.learning.training import BackboneModule
from models.reporting.model_card import model_card

FILES = "files"  # in proactive.json: what the export wrote
KEPT = ".kept"  # ends the name of a file of the user's own that has the name of one of the export's
# What an export wrote before proactive.json said so.
WRITTEN_BEFORE = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    EXPORT_STATE,
}


def export_model(
    model: BackboneModule,
    data: RowsDataModule,
    record: dict[str, Any] | None,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write weights, configuration, tokenizer and model card to `folder`, in place of an earlier export there.

    The folder holds the earlier export or the new one at any moment. What else lies in it stays there.

    Args:
        model: What to export.
        data: What it was trained on.
        record: What its test found out; without one the model card has no figures.
        folder: Where to.
        weights: See `models.learning.saved_models.export_weights`.

    Raises:
        UserError: Something else than an export is there.
    """
    folder = folder.resolve()
    refuse_other_folder(folder)
    with Unfinished(folder, folder=True) as unfinished:
        _write(model, data, record, unfinished.path, weights)
        for path in _foreign(folder):
            taken = (unfinished.path / path.name).exists()
            _link(path, unfinished.path / (f"{path.name}{KEPT}" if taken else path.name))
        put_in_place(unfinished.path, folder)


def _write(
    model: BackboneModule,
    data: RowsDataModule,
    record: dict[str, Any] | None,
    folder: Path,
    weights: dict[str, Tensor] | None,
) -> None:
    """Write all files of an export."""
    export_weights(model, folder, data.state_dict(), weights)
    data.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(model, data, record), encoding="utf-8")
    content = export_state(folder)
    content["around"] = {"before": data.segmenter.prefix, "after": data.end}  # what begins and ends every row
    content[FILES] = sorted(path.name for path in folder.iterdir())
    (folder / EXPORT_STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def refuse_other_folder(folder: Path) -> None:
    """Refuse to write an export where something else is.

    Raises:
        UserError: There is a file, or a folder that is neither empty nor an export.
    """
    recover(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not is_export(folder):
        raise UserError(
            f"{folder} exists and is no export of this project", "Move it away, or give a folder that does not exist."
        )


def is_export(folder: Path) -> bool:
    """Whether this project wrote a folder."""
    try:
        return bool(export_state(folder))
    except UserError:
        return False


def _foreign(folder: Path) -> list[Path]:
    """What the user has put into an export."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    written = set(export_state(folder).get(FILES, WRITTEN_BEFORE))
    return [path for path in folder.iterdir() if path.name not in written]


def _link(path: Path, other: Path) -> None:
    """Give a file, or all files of a folder, a second name, by a copy where the disk has no links."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, other, symlinks=True, copy_function=link)
    else:
        link(str(path), str(other))
