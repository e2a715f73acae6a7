"""Exports: a folder with weights, tokenizer and model card that transformers loads."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.batching.answer_rows import AnswersDataModule
from datamodules.batching.rows import RowsDataModule
from datamodules.errors import UserError
from datamodules.files.writing import Unfinished, put_in_place, recover
from models.learning.checkpoint_paths import EXPORT_STATE
from models.learning.saved_models import export_state, export_weights
from models.learning.training import BackboneModule
from models.networks.network_options import ExportDtype
from models.reporting.model_card import model_card

FILES = "files"  # key in proactive.json of the files that the export wrote
KEPT = ".kept"  # suffix of a user's file that has the name of a file of the export
# Files of exports by versions that did not list them in proactive.json.
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
    dtype: ExportDtype | None = None,
) -> None:
    """Write weights, configuration, tokenizer and model card to a folder.

    An earlier export there is replaced atomically. Other files in the folder stay.

    Args:
        model: The model to export.
        data: The data of its training.
        record: The `run_record` of its test; without one the model card has no metrics.
        folder: The folder to write.
        weights: See `models.learning.saved_models.export_weights`.
        dtype: The dtype of the weights; that of the network if None.

    Raises:
        UserError: The folder contains something other than an export, or it cannot be written.
    """
    folder = folder.resolve()
    refuse_other_folder(folder)
    with Unfinished(folder, folder=True) as unfinished:
        _write(model, data, record, unfinished.path, weights, dtype)
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
    dtype: ExportDtype | None,
) -> None:
    """Write all files of an export."""
    export_weights(model, folder, data.state_dict(), weights, dtype)
    data.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(model, data, record, dtype), encoding="utf-8")
    content = export_state(folder)
    content["around"] = {  # token ids around each row, and after what a text begins without a mark
        "before": data.segmenter.prefix,
        "after": data.end,
        "unmarked": data.segmenter.unmarked,
    }
    if isinstance(data, AnswersDataModule) and data.chat:
        _stop_at(folder, data.end_id)
    content[FILES] = sorted(path.name for path in folder.iterdir())
    (folder / EXPORT_STATE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _stop_at(folder: Path, token: int) -> None:
    """Make servers of an exported agent stop at the token that ends its answers."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return  # an adapter, whose base has it
    config = GenerationConfig.from_pretrained(folder)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if token not in known:
        config.eos_token_id = [token, *(other for other in known if other is not None)]
        config.save_pretrained(folder)


def refuse_other_folder(folder: Path) -> None:
    """Refuse to write an export over other files.

    Raises:
        UserError: The path is a file, or a folder that is neither empty nor an export.
    """
    recover(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not is_export(folder):
        raise UserError(f"{folder} exists and is not an export of this project", "Move it away, or give a new folder.")


def is_export(folder: Path) -> bool:
    """Whether a folder is an export of this project."""
    try:
        return bool(export_state(folder))
    except UserError:
        return False


def _foreign(folder: Path) -> list[Path]:
    """Files that the user added to an export."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    written = set(export_state(folder).get(FILES, WRITTEN_BEFORE))
    return [path for path in folder.iterdir() if path.name not in written]


def _link(path: Path, other: Path) -> None:
    """Hard-link a file, or all files of a folder; copy on file systems without links."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, other, symlinks=True, copy_function=link)
    else:
        link(str(path), str(other))
