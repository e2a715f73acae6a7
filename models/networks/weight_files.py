"""Checks of files with weights and configurations: each tensor and each name, before it is used."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    RootModel,
)
from torch import Tensor

from datamodules.corpus.json_records import read_json
from datamodules.corpus.records import json_object
from datamodules.errors import UserError

WEIGHTS_INDEX = "model.safetensors.index.json"
HINT = "Give a checkpoint or an export as python -m proactive.fit wrote it."
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def _file_name(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError("expected the name of a file in the same folder")
    return name


def checked_configuration(value: dict[str, Any]) -> dict[str, Any]:
    """Validate a backbone's configuration. One that names code to fetch, such as attention from a hub, is refused."""
    if not isinstance(value.get("model_type"), str):
        raise ValueError("expected an object that names its model_type")
    for name in IMPLEMENTATIONS:
        checked_implementation(value.get(name))
    return value


def checked_implementation(value: Any) -> Any:
    """Validate the name of an implementation, or None. A name of code to fetch is refused."""
    if value is not None and (not isinstance(value, str) or "/" in value):
        raise ValueError("expected an implementation that transformers has, not code of a hub")
    return value


FileName = Annotated[str, AfterValidator(_file_name)]


CheckedConfiguration = Annotated[dict[str, Any], AfterValidator(json_object), AfterValidator(checked_configuration)]


class Configuration(RootModel[CheckedConfiguration]):
    """The content of a network's config.json."""

    hint: ClassVar[str] = HINT


class WeightsIndex(BaseModel):
    """The file of each tensor, in the folder of the index."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    hint: ClassVar[str] = "Fetch the files again, or give another folder."

    weight_map: dict[str, FileName]


@contextmanager
def naming_file(where: Path | str) -> Iterator[None]:
    """Prefix each UserError with the file that it is about."""
    try:
        yield
    except UserError as error:
        if str(where) in error.what:
            raise
        raise UserError(f"{where}: {error.what}", error.hint) from error


def refuse_other_tensors(found: Mapping[str, Any], needed: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly a network's: missing, unexpected, of another shape or type, or not finite.

    Args:
        found: The tensors of a file, by name.
        needed: The tensors of the network, by name.

    Raises:
        UserError: There is such a tensor. The message names the first.
    """
    refuse_names(needed.keys() - found.keys(), found.keys() - needed.keys())
    for name, own in needed.items():
        value = found[name]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{name} is a {type(value).__name__}, not a plain tensor on the CPU", HINT)
        if value.shape != own.shape:
            refuse_other_shape(name, value.shape, own.shape)
        if value.is_floating_point() != own.is_floating_point():
            raise UserError(f"{name} has the type {value.dtype}, not {own.dtype}", HINT)
    refuse_not_finite(found.items())


def refuse_other_shape(name: str, found: Sequence[int], needed: Sequence[int]) -> NoReturn:
    """Refuse a tensor with another shape than the network's.

    Raises:
        UserError: Always.
    """
    raise UserError(f"{name} has the shape {tuple(found)}, not {tuple(needed)}", HINT)


def refuse_names(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse files that lack tensors of the network, or contain others.

    Raises:
        UserError: There is such a tensor. The message names the first.
    """
    if names := sorted(missing):
        raise UserError(f"lacks {len(names)} tensors, the first of them {names[0]}", HINT)
    if names := sorted(unexpected):
        raise UserError(
            f"contains {len(names)} tensors that the network does not have, the first of them {names[0]}", HINT
        )


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights with NaN or infinite values.

    Raises:
        UserError: A tensor has such a value. The message names the tensor.
    """
    for name, value in tensors:
        if not all_finite(value):
            raise UserError(f"{name} contains values that are not finite", "Give undamaged weights.")


def all_finite(value: Tensor) -> bool:
    """Whether all values are finite, computed without a second tensor of that size."""
    if not value.is_floating_point() or not value.numel() or value.device.type == "meta":
        return True
    plain = value.detach().float() if value.element_size() == 1 else value.detach()
    return bool(torch.isfinite(torch.stack(torch.aminmax(plain))).all())


def read_index(path: Path) -> dict[str, str]:
    """Read an index of weights: the name of each tensor's file, in the folder of the index.

    Raises:
        UserError: The file is not such an index, or names files in other folders.
    """
    return read_json(path, WeightsIndex)[0].weight_map


def safetensors_files(folder: Path, single: str) -> list[Path]:
    """The files of a folder's weights: those that its index names, or the file `single`.

    Raises:
        UserError: The index is invalid, or a file is missing.
    """
    index = folder / WEIGHTS_INDEX
    names = sorted(set(read_index(index).values())) if index.is_file() else [single]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} has no {missing[0]}", "Fetch the files again, or give another folder.")
    return [folder / name for name in names]


def weights_in(files: Iterable[Path]) -> tuple[int, int]:
    """The number of tensors and of values in safetensors files, from their headers.

    Raises:
        UserError: A file is not in this format.
    """
    from safetensors import SafetensorError, safe_open

    tensors = weights = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118 - it is not a mapping
                    tensors += 1
                    weights += torch.Size(source.get_slice(name).get_shape()).numel()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a safetensors file ({error})", "Give undamaged weights.") from error
    return tensors, weights
