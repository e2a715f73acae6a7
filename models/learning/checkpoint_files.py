"""Checkpoints that survive a kill, refuse code, and let a run go on bit for bit.

`SafeCheckpointIO` writes beside the old file and renames, and loads weights and plain values only.
`BestCheckpoint` keeps the best weights.
`LastCheckpoint` keeps `last.ckpt` current, also when the process is asked to stop.
`SeedEachStep` makes the randomness of a step a function of its number, so that it needs no state.
"""

import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import torch

from datamodules.corpus.records import validate
from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.files.reading import require_regular_files
from datamodules.files.run_folders import CHECKPOINTS
from models.learning import sharded_files as shards
from models.learning.checkpoint_contents import ShardFiles, refuse_options
from models.learning.training import EXPORT_STATE, BackboneModule, export_state
from models.networks.backbone import refuse_unfit_tokenizer
from models.networks.weight_files import naming

LAST = "last.ckpt"
BEST = "best.ckpt"

Model = TypeVar("Model", bound=BackboneModule)


def refuse_damaged(path: Path, problem: str | None) -> None:
    """Raise a UserError that names the newest good checkpoint beside one that has a problem."""
    if not problem:
        return
    others = [p for p in path.parent.glob("*.ckpt") if p != path and checkpoint_problem(p) is None]
    newest = max(others, key=lambda p: p.stat().st_mtime, default=None)
    hint = f"The newest good one is {newest}: give it as --ckpt_path or --checkpoint." if newest else ""
    raise UserError(f"{path}: {problem}", hint or "There is no good checkpoint beside it; start a new run.")


def load_checkpoint(path: Path, *, checked: bool = False, whole: bool = True) -> dict[str, Any]:
    """Load weights and plain values; nothing in the files can run code.

    Args:
        path: A checkpoint file, or the folder that ranks wrote together.
        checked: Whether it is known to be undamaged.
        whole: Whether to join the shards of a folder; without them its other values alone.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or it holds more than weights and plain values.
    """
    if not checked:
        refuse_damaged(path, checkpoint_problem(path))
    sharded = shards.is_sharded(path)
    try:
        file = path / shards.VALUES if sharded else path
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=not whole)
    except (pickle.UnpicklingError, RecursionError) as error:
        raise UserError(
            f"{path}: refused, for it holds more than weights and plain values and could run code",
            "Use a checkpoint that this project wrote.",
        ) from error
    except Exception as error:  # whatever a foreign or damaged archive makes the reader say
        reason = error_text(error, 200)
        raise UserError(f"{path}: no checkpoint ({reason})", "Use a checkpoint that this project wrote.") from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint",
            "Use a checkpoint that this project wrote.",
        )
    return _joined(path, checkpoint) if sharded and whole else checkpoint


def _joined(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as one device writes it, of the shards and the other values that ranks wrote."""
    state = {**values["state_dict"], **shards.read_whole(folder / shards.WEIGHTS)}
    state |= {name: state[first] for name, first in values["aliases"].items() if first in state}
    kept = shards.read_whole(folder / shards.OPTIMIZER)
    optimizers = []
    for number, optimizer in enumerate(values["optimizer_states"]):
        mine = {name.partition("|")[2]: value for name, value in kept.items() if name.startswith(f"{number}|")}
        optimizers.append(shards.numbered({**optimizer, "state": {**optimizer["state"], **mine}}))
    return {**values, "state_dict": state, "optimizer_states": optimizers}


def load_run(path: Path, kind: type[BackboneModule], **options: bool) -> dict[str, Any]:
    """Load a checkpoint that a run of `python -m proactive.fit` wrote.

    Args:
        path: The checkpoint.
        kind: The class of its model.
        options: See `load_checkpoint`.

    Raises:
        UserError: As `load_checkpoint`, or it is something else, or of another task.
    """
    checkpoint = load_checkpoint(path, **options)
    found = checkpoint.get("task")
    if isinstance(found, str) and found != kind.task:
        raise UserError(f"{path} is of task {found}, not {kind.task}", f"Give a checkpoint of task {kind.task}.")
    validate(checkpoint, kind.checkpoint_record, str(path))
    return checkpoint


def load_trained(kind: type[Model], target: Path, option: str) -> tuple[Model, dict[str, Any], Path]:
    """A trained model, from a run folder (its best weights), a checkpoint, or an export folder.

    Args:
        kind: The model's class.
        target: Where it is.
        option: What the user gave `target` as.

    Returns:
        The model, its data module's state, and the file or folder that the weights came from.

    Raises:
        UserError: There is no such model there.
    """
    if (shards.settled(target) / EXPORT_STATE).is_file():
        require_regular_files(target, option)
        with naming(target):
            model, state = kind.from_export(target)
    else:
        target = _checkpoint_of(target, option)
        with naming(target):
            checkpoint = load_run(target, kind)
            model, state = kind.from_checkpoint(checkpoint), checkpoint[kind.data_class.__qualname__]
    with naming(target):
        refuse_options(kind.data_class, state["hyperparameters"], "hyperparameters")
        data = kind.data_class.from_state(state)
        refuse_unfit_tokenizer(model.network, data.tokenizer)
    return model, state, target


def checkpoint_task(target: Path, option: str, tasks: Collection[str]) -> str:
    """Which task a run folder, a checkpoint or an export folder names.

    Args:
        target: Where it is.
        option: What the user gave `target` as.
        tasks: Those that there are.

    Raises:
        UserError: As `load_trained`, or it names no such task.
    """
    if (shards.settled(target) / EXPORT_STATE).is_file():
        task = export_state(target).get("task")
    else:
        task = load_checkpoint(_checkpoint_of(target, option), whole=False).get("task")
    if not isinstance(task, str) or task not in tasks:
        raise UserError(
            f"{option}: {target} is no checkpoint of a run: it names no task",
            "Give one that python -m proactive.fit wrote.",
        )
    return str(task)


def _checkpoint_of(target: Path, option: str) -> Path:
    """The checkpoint that `target` is, or the best one of the run folder that it is."""
    if (target / CHECKPOINTS).is_dir():
        names = (shards.settled(target / CHECKPOINTS / name) for name in (BEST, LAST))
        target = next((path for path in names if path.exists()), target)
    shards.settled(target)
    if not target.exists() or (target.is_dir() and not shards.is_sharded(target)):
        raise UserError(
            f"{option}: {target} holds no checkpoint" if target.exists() else f"{option}: there is no {target}",
            f"Give a run folder, a checkpoint, or an export folder (with {EXPORT_STATE}).",
        )
    require_regular_files(target, option)
    return target


def checkpoint_problem(path: Path) -> str | None:
    """What keeps a checkpoint from being whole, or None; reads it once and compares its checksums."""
    if shards.is_sharded(path):
        return _file_problem(path / shards.VALUES) or _shards_problem(path)
    return _file_problem(path)


def _shards_problem(folder: Path) -> str | None:
    """The same for the files that values.pt names."""
    try:
        values = torch.load(folder / shards.VALUES, map_location="cpu", weights_only=True, mmap=True)
        expected = validate(values, ShardFiles, shards.VALUES).files
        if unknown := shards.files(folder) - expected.keys():
            return f"holds {min(unknown)}, which it was not written with"
        found = shards.checksums(folder, (folder / name for name in expected))
        damaged = next((name for name, checksum in expected.items() if found[name] != checksum), None)
        return f"damaged in {damaged}" if damaged else None
    except UserError as error:
        return error.what
    except pickle.UnpicklingError:
        return None  # loading it says what is wrong
    except FileNotFoundError as error:
        return f"lacks {Path(error.filename).relative_to(folder)}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # whatever a foreign archive makes the reader say
        return f"no checkpoint ({error_text(error, 200)})"


def _file_problem(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            odd = [info.filename for info in archive.infolist() if info.is_dir() or info.external_attr]
            damaged = archive.testzip() or next(iter(odd), None)  # PyTorch reads a "folder" as zeros
            return f"damaged in {damaged}" if damaged else None
    except FileNotFoundError:
        return "there is no such checkpoint"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # zipfile raises a dozen kinds on a damaged table of contents
        return f"truncated, damaged or no checkpoint ({error_text(error, 200)})"
