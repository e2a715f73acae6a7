"""Checkpoints that many ranks write together: a folder with each rank's shards, and one file with all else.

    last.ckpt/
        weights/*.safetensors      written by PyTorch's distributed checkpoints, which join and cut shards again
        optimizer/*.safetensors    the same for what the optimizer keeps of each weight
        values.pt                  all that is no shard, as in a checkpoint of one file, and the files' checksums

The usual format of distributed checkpoints has a pickled index, which could run code when it is loaded. Safetensors
files carry their own; values.pt is loaded with weights_only.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.files.writing import checksum, remove

VALUES = "values.pt"
WEIGHTS = "weights"
OPTIMIZER = "optimizer"
FILE_SIZE = 2**31  # of a rank's shards: the writer holds a file's bytes twice
AT_WORKING_DIRECTORY, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2


def is_sharded(path: Path) -> bool:
    """Whether there is a checkpoint of many ranks."""
    return (path / VALUES).is_file()


def link(path: Path, other: Path) -> None:
    """Give a checkpoint of either kind another name, without a copy of its content."""
    if path.is_dir():
        shutil.copytree(path, other, copy_function=os.link)
    else:
        os.link(path, other)


def put_in_place(new: Path, target: Path) -> None:
    """Rename a new file or folder to where the previous one is, which is then removed.

    There is the old one or the new one at any moment. Where the system cannot exchange two folders in one step, a kill
    in the middle can leave the old one under another name: see `settled`.
    """
    replaced = _replaced(target)
    if target.exists() and (target.is_dir() or new.is_dir()):
        remove(replaced)
        if _exchange(new, target):
            remove(new)
            return
        target.rename(replaced)
    new.replace(target)
    remove(replaced)


def settled(path: Path) -> Path:
    """The path itself, once what a kill in the middle of `put_in_place` left aside is back there."""
    if not path.exists():
        with contextlib.suppress(FileNotFoundError):  # there is none, or another rank has just done it
            _replaced(path).rename(path)
    return path


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step; False where the system or the disk cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    places = (AT_WORKING_DIRECTORY, os.fsencode(one), AT_WORKING_DIRECTORY, os.fsencode(other))
    return rename is not None and rename(*places, EXCHANGE) == 0


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is spread over ranks, and all else."""
    from torch.distributed.tensor import DTensor

    shards: dict[str, Tensor] = {name: value for name, value in state.items() if isinstance(value, DTensor)}
    return shards, {name: value for name, value in state.items() if name not in shards}


def aliases(module: nn.Module) -> dict[str, str]:
    """The further names of weights that have several, and the first one."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: known for name, weight in named if (known := first.setdefault(id(weight), name)) != name}


def write_shards(shards: dict[str, Tensor], folder: Path) -> None:
    """Write every rank's shards; all ranks have to call this."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    number, size, file_of = 1, 0, {}
    for name, shard in shards.items():
        if size >= FILE_SIZE:
            number, size = number + 1, 0
        file_of[name] = number
        size += shard.numel() * shard.element_size() // torch.distributed.get_world_size()
    writer = HuggingFaceStorageWriter(str(folder), file_of, save_distributed=True)
    dcp.save(shards, storage_writer=writer)


def read_shards(folder: Path, targets: dict[str, Tensor]) -> None:
    """Read into tensors, whole or spread over any number of ranks, what some number of ranks wrote."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if targets:
        with _readable(folder), warnings.catch_warnings():  # each process reads its own part, and need not hear so
            warnings.filterwarnings("ignore", ".*load in a single process.*")
            dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def stored(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and type of each tensor that ranks wrote."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if not folder.is_dir():
        return {}
    with _readable(folder):
        metadata: Mapping[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        found = {name: (tensor.size, tensor.properties.dtype) for name, tensor in metadata.items()}
        needed = sum(size.numel() * dtype.itemsize for size, dtype in found.values())
        if needed > (there := sum(path.stat().st_size for path in folder.iterdir())):
            raise ValueError(f"tensors of {needed:,} bytes cannot be in files of {there:,}")
    return found


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Tell in one line of files that are no shards of a checkpoint."""
    try:
        yield
    except Exception as error:  # whatever a foreign or damaged file makes the reader say
        reason = error_text(error, 200)
        raise UserError(f"{folder}: no shards of a checkpoint ({reason})", "Give another checkpoint.") from error


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors that ranks wrote, each whole."""
    targets = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in stored(folder).items()}
    read_shards(folder, targets)
    return targets


def files(folder: Path) -> set[str]:
    """The names of the files of a checkpoint that hold shards."""
    return {path.relative_to(folder).as_posix() for name in (WEIGHTS, OPTIMIZER) for path in (folder / name).glob("*")}


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, int]:
    """CRC-32 of files, by their names in the folder."""
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def content_digest(path: Path) -> str:
    """A digest of a checkpoint's content, of either kind; it reads the archive's own checksums alone."""
    with zipfile.ZipFile(path / VALUES if path.is_dir() else path) as archive:  # values.pt has those of the shards
        entries = [f"{entry.CRC} {entry.file_size} {entry.filename.partition('/')[2]}" for entry in archive.infolist()]
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def sync(folder: Path) -> None:
    """See to it that a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What an optimizer keeps of each weight, under the weight's name


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state by the names of the weights: `{"state": {"name|key": value}, "param_groups": [...]}`."""
    names = {id(weight): name for name, weight in module.named_parameters()}
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [names[id(p)] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    state = {f"{names[id(p)]}|{key}": value for p, kept in optimizer.state.items() for key, value in kept.items()}
    return {"state": state, "param_groups": groups}


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """The same as PyTorch's optimizers load it, by the weights' numbers."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: place for place, name in enumerate(names)}
    by_number: dict[int, dict[str, Any]] = {}
    for name, value in state["state"].items():
        weight, _, key = str(name).rpartition("|")
        if weight not in number:
            raise UserError(f"optimizer_states: there is no weight {weight}", "Give another checkpoint.")
        by_number.setdefault(number[weight], {})[key] = value
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": by_number, "param_groups": groups}
