"""Sharded checkpoints, which all ranks write together: a folder with each rank's shards, and one file with the rest.

    last.ckpt/
        weights/*.safetensors      written by PyTorch's distributed checkpointing, which also joins and reshards
        optimizer/*.safetensors    the same for the optimizer's state of each weight
        values.pt                  what is not sharded, as in a checkpoint file, and checksums of the other files

The usual format of distributed checkpointing has a pickled index, which could run code when it is loaded. Safetensors
files contain their own index. values.pt is loaded with weights_only.
"""

import contextlib
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
from datamodules.files.writing import checksum
from models.learning.checkpoint_paths import VALUES

WEIGHTS = "weights"
OPTIMIZER = "optimizer"
FILE_SIZE = 2**31  # bytes of one file of a rank: the writer needs twice as much memory


def link(path: Path, other: Path) -> None:
    """Give a checkpoint, a file or a folder, another name without copying its content (hard links)."""
    if path.is_dir():
        shutil.copytree(path, other, copy_function=os.link)
    else:
        os.link(path, other)


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The sharded tensors of a state dict, and all other values."""
    from torch.distributed.tensor import DTensor

    shards: dict[str, Tensor] = {name: value for name, value in state.items() if isinstance(value, DTensor)}
    return shards, {name: value for name, value in state.items() if name not in shards}


def aliases(module: nn.Module) -> dict[str, str]:
    """The names of tied weights except the first name of each weight, with that first name."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: known for name, weight in named if (known := first.setdefault(id(weight), name)) != name}


def write_shards(shards: dict[str, Tensor], folder: Path) -> None:
    """Write the shards of all ranks. All ranks must call this."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    file, size, file_of = 1, 0, {}
    for name, shard in shards.items():
        if size >= FILE_SIZE:
            file, size = file + 1, 0
        file_of[name] = file
        size += shard.numel() * shard.element_size() // torch.distributed.get_world_size()
    writer = HuggingFaceStorageWriter(str(folder), file_of, save_distributed=True)
    dcp.save(shards, storage_writer=writer)


def read_shards(folder: Path, targets: dict[str, Tensor]) -> None:
    """Read shards into tensors, which are full or sharded over any number of ranks."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if targets:
        with _readable(folder), warnings.catch_warnings():  # each process reads its own part, as intended
            warnings.filterwarnings("ignore", ".*load in a single process.*")
            dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def tensor_layouts(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and dtype of each tensor in a folder of shards.

    Raises:
        UserError: The folder has other files, or the files are too small for their tensors.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    if not folder.is_dir():
        return {}
    with _readable(folder):
        metadata: Mapping[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        found = {name: (tensor.size, tensor.properties.dtype) for name, tensor in metadata.items()}
        needed = sum(size.numel() * dtype.itemsize for size, dtype in found.values())
        if needed > (available := sum(path.stat().st_size for path in folder.iterdir())):
            raise ValueError(f"tensors of {needed:,} bytes cannot be in files of {available:,}")
    return found


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Within this context, any error becomes a UserError that says that the folder contains no shards."""
    try:
        yield
    except Exception as error:  # a foreign or damaged file can cause errors of many types
        reason = error_text(error, 200)
        raise UserError(f"{folder}: not the shards of a checkpoint ({reason})", "Give another checkpoint.") from error


def read_full(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder of shards, each joined to a full tensor."""
    targets = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in tensor_layouts(folder).items()}
    read_shards(folder, targets)
    return targets


def files(folder: Path) -> set[str]:
    """The names of a checkpoint's files with shards."""
    return {path.relative_to(folder).as_posix() for name in (WEIGHTS, OPTIMIZER) for path in (folder / name).glob("*")}


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, int]:
    """The CRC-32 of files, by their names in the folder."""
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def content_digest(path: Path) -> str:
    """A digest of the content of a checkpoint, a file or a folder. It reads only checksums."""
    with zipfile.ZipFile(path / VALUES if path.is_dir() else path) as archive:  # with checksums of the shards
        entries = [f"{entry.CRC} {entry.file_size} {entry.filename.partition('/')[2]}" for entry in archive.infolist()]
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def sync(folder: Path) -> None:
    """Write a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Optimizer states by the names of weights


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer by names: `{"state": {"name|key": value}, "param_groups": [...]}`.

    PyTorch's `get_optimizer_state_dict` gives the same names, but takes a step if there is no state yet, which would
    change a run that is saved before its first step.
    """
    names = {id(weight): name for name, weight in module.named_parameters()}
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [names[id(p)] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    state = {f"{names[id(p)]}|{key}": value for p, saved in optimizer.state.items() for key, value in saved.items()}
    return {"state": state, "param_groups": groups}


def by_index(state: dict[str, Any]) -> dict[str, Any]:
    """The result of `optimizer_state` as optimizers load it, by the indices of weights.

    Raises:
        UserError: A name is not in the groups.
    """
    names = [name for group in state["param_groups"] for name in group["params"]]
    index = {name: position for position, name in enumerate(names)}
    by_weight: dict[int, dict[str, Any]] = {}
    for name, value in state["state"].items():
        weight, _, key = str(name).rpartition("|")
        if weight not in index:
            raise UserError(f"optimizer_states: there is no weight {weight}", "Give another checkpoint.")
        by_weight.setdefault(index[weight], {})[key] = value
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": by_weight, "param_groups": groups}
