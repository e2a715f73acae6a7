"""Loads checkpoints: checks their checksums, runs no code from them, and validates their contents.

`callbacks.checkpoint_io.SafeCheckpointIO` and `callbacks.fully_sharded.FullySharded` write them.
"""

import pickle
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from datamodules.corpus.json_records import validate
from datamodules.errors import UserError
from datamodules.escaping import error_text
from models.learning import sharded_files as shards
from models.learning.checkpoint_contents import ShardFiles, refuse_options
from models.learning.checkpoint_paths import VALUES, holds_export, is_sharded, weights_path
from models.learning.saved_models import export_state, model_from_checkpoint, model_from_export
from models.learning.training import BackboneModule
from models.networks.configurations import refuse_unfit_tokenizer
from models.networks.weight_files import naming_file

Model = TypeVar("Model", bound=BackboneModule)


def refuse_damaged(path: Path, problem: str | None) -> None:
    """Refuse a damaged checkpoint.

    Args:
        path: The checkpoint.
        problem: The result of `checkpoint_problem`.

    Raises:
        UserError: There is a problem. The hint names the newest good checkpoint in the same folder.
    """
    if not problem:
        return
    others = [p for p in path.parent.glob("*.ckpt") if p != path and checkpoint_problem(p) is None]
    others.sort(key=lambda p: p.stat().st_mtime)
    hint = "There is no good checkpoint in this folder; start a new run."
    if others:
        hint = f"The newest good one is {others[-1]}: give it as --ckpt_path or --checkpoint."
        if not _has_optimizer_state(others[-1]):
            whole = next(filter(_has_optimizer_state, reversed(others)), None)
            resume = f"resume from {whole}" if whole else "no run can resume from it"
            hint = f"The newest good one is {others[-1]}, with weights alone: give it as --checkpoint; {resume}."
    raise UserError(f"{path}: {problem}", hint)


def _has_optimizer_state(path: Path) -> bool:
    """Whether a run can resume from a good checkpoint."""
    try:
        return bool(load_checkpoint(path, checked=True, whole=False).get("optimizer_states"))
    except UserError:
        return False  # it is not one of this project


def load_checkpoint(path: Path, *, checked: bool = False, whole: bool = True) -> dict[str, Any]:
    """Load weights and plain values. Nothing in the files can run code.

    Args:
        path: A checkpoint file, or the folder of a sharded checkpoint.
        checked: Whether its checksums were verified before.
        whole: Whether to load everything. If False, shards are not loaded, and a file is only mapped into memory.

    Raises:
        UserError: The checkpoint does not exist, is damaged, or contains more than weights and plain values.
    """
    if not checked:
        refuse_damaged(path, checkpoint_problem(path))
    sharded = is_sharded(path)
    try:
        file = path / VALUES if sharded else path
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=not whole)
    except (pickle.UnpicklingError, RecursionError) as error:
        raise UserError(
            f"{path}: refused, because it contains more than weights and plain values and could run code",
            "Use a checkpoint that this project wrote.",
        ) from error
    except Exception as error:  # a foreign or damaged archive can cause errors of many types
        reason = error_text(error, 200)
        raise UserError(f"{path}: not a checkpoint ({reason})", "Use a checkpoint that this project wrote.") from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path}: contains a {type(checkpoint).__name__}, not a checkpoint",
            "Use a checkpoint that this project wrote.",
        )
    return _joined(path, checkpoint) if sharded and whole else checkpoint


def _joined(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Join a sharded checkpoint: the result has the format of a checkpoint file of one device."""
    state = {**values["state_dict"], **shards.read_full(folder / shards.WEIGHTS)}
    state |= {name: state[first] for name, first in values["aliases"].items() if first in state}
    sharded = shards.read_full(folder / shards.OPTIMIZER)
    optimizers = []
    for index, optimizer in enumerate(values["optimizer_states"]):
        own = {name.partition("|")[2]: value for name, value in sharded.items() if name.startswith(f"{index}|")}
        optimizers.append(shards.by_index({**optimizer, "state": {**optimizer["state"], **own}}))
    return {**values, "state_dict": state, "optimizer_states": optimizers}


def load_run(path: Path, kind: type[BackboneModule], **options: bool) -> dict[str, Any]:
    """Load a checkpoint of a run of `python -m proactive.fit`.

    Args:
        path: The checkpoint.
        kind: The class of its model.
        options: See `load_checkpoint`.

    Raises:
        UserError: As `load_checkpoint`, or the checkpoint is not one of a run, or of another task.
    """
    return _load_run_of(path, (kind,), **options)[1]


def _load_run_of(path: Path, kinds: Sequence[type[Model]], **options: bool) -> tuple[type[Model], dict[str, Any]]:
    """Load a checkpoint, and return the class in `kinds` that its model has, and the checkpoint."""
    checkpoint = load_checkpoint(path, **options)
    found = checkpoint.get("task")
    kind = _kind_of_task(kinds, found, path) if isinstance(found, str) else kinds[0]
    validate(checkpoint, kind.checkpoint_record, str(path))
    return kind, checkpoint


def _kind_of_task(kinds: Sequence[type[Model]], task: str, path: Path) -> type[Model]:
    """Return the class with the task of a saved model, or raise a UserError."""
    for kind in kinds:
        if kind.task == task:
            return kind
    tasks = " or ".join(kind.task for kind in kinds)
    raise UserError(f"{path} is of task {task}, not {tasks}", f"Give a model of task {tasks}.")


def load_trained(kinds: Sequence[type[Model]], target: Path, option: str) -> tuple[Model, dict[str, Any], Path]:
    """Load a trained model from a run folder (the best weights), a checkpoint, or an export folder.

    Args:
        kinds: The classes of models that fit.
        target: The folder or file.
        option: The option that `target` is the value of.

    Returns:
        The model, its data module's state, and the file or folder that the weights came from.

    Raises:
        UserError: There is no model of these classes.
    """
    target = weights_path(target, option)
    with naming_file(target):
        if holds_export(target):
            kind = _kind_of_task(kinds, export_state(target)["task"], target)
            model, state = model_from_export(kind, target)
        else:
            kind, checkpoint = _load_run_of(target, kinds)
            model, state = model_from_checkpoint(kind, checkpoint), checkpoint[kind.data_class.__qualname__]
        refuse_options(model.data_class, state["hyperparameters"], "hyperparameters")
        data = model.data_class.from_state(state)
        refuse_unfit_tokenizer(model.network, data.tokenizer)
    return model, state, target


def checkpoint_task(target: Path, option: str, tasks: Collection[str]) -> str:
    """The task of a run folder, a checkpoint or an export folder.

    Args:
        target: The folder or file.
        option: The option that `target` is the value of.
        tasks: The names of all tasks.

    Raises:
        UserError: As `load_trained`, or there is no such task.
    """
    target = weights_path(target, option)
    task = (export_state(target) if holds_export(target) else load_checkpoint(target, whole=False)).get("task")
    if not isinstance(task, str) or task not in tasks:
        raise UserError(
            f"{option}: {target} is not a checkpoint of a run: it names no task",
            "Give one that python -m proactive.fit wrote.",
        )
    return str(task)


def checkpoint_problem(path: Path) -> str | None:
    """Read a checkpoint once, and compare its checksums.

    Returns:
        How it is damaged; None if it is not.
    """
    if is_sharded(path):
        return _file_problem(path / VALUES) or _shards_problem(path)
    return _file_problem(path)


def _shards_problem(folder: Path) -> str | None:
    """The same for the files with shards. Their checksums are in values.pt."""
    try:
        values = torch.load(folder / VALUES, map_location="cpu", weights_only=True, mmap=True)
        expected = validate(values, ShardFiles, VALUES).files
        if unknown := shards.files(folder) - expected.keys():
            return f"contains {min(unknown)}, which was not written with it"
        found = shards.checksums(folder, (folder / name for name in expected))
        damaged = next((name for name, checksum in expected.items() if found[name] != checksum), None)
        return f"damaged in {damaged}" if damaged else None
    except UserError as error:
        return error.what
    except pickle.UnpicklingError:
        return None  # loading it reports this
    except FileNotFoundError as error:
        return f"lacks {Path(error.filename).relative_to(folder)}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # a foreign archive can cause errors of many types
        return f"not a checkpoint ({error_text(error, 200)})"


def _file_problem(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            odd = [info.filename for info in archive.infolist() if info.is_dir() or info.external_attr]
            damaged = archive.testzip() or next(iter(odd), None)  # PyTorch reads an entry of type folder as zeros
            return f"damaged in {damaged}" if damaged else None
    except FileNotFoundError:
        return "there is no such checkpoint"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # zipfile raises errors of many types for a damaged table of contents
        return f"truncated, damaged or not a checkpoint ({error_text(error, 200)})"
