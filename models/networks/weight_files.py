"""Files of weights and configurations: each tensor and each name is checked before it is used."""

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

from datamodules.corpus.records import json_object, read_json
from datamodules.errors import UserError

WEIGHTS_INDEX = "model.safetensors.index.json"
HINT = "Give a checkpoint or an export as python -m proactive.fit wrote it."
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def _file_name(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError("expected the name of a file beside it")
    return name


def checked_configuration(value: dict[str, Any]) -> dict[str, Any]:
    """A backbone's configuration; where it names code to fetch, as attention of a hub, it is refused."""
    if not isinstance(value.get("model_type"), str):
        raise ValueError("expected an object that names its model_type")
    for name in IMPLEMENTATIONS:
        checked_implementation(value.get(name))
    return value


def checked_implementation(value: Any) -> Any:
    """An implementation by name, if any; one that names code to fetch is refused."""
    if value is not None and (not isinstance(value, str) or "/" in value):
        raise ValueError("expected an implementation that transformers has, not code of a hub")
    return value


FileName = Annotated[str, AfterValidator(_file_name)]


Checked = Annotated[dict[str, Any], AfterValidator(json_object), AfterValidator(checked_configuration)]


class Configuration(RootModel[Checked]):
    """What config.json of a network holds."""

    hint: ClassVar[str] = HINT


class WeightsIndex(BaseModel):
    """In which file beside it each tensor lies."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    hint: ClassVar[str] = "Fetch the files again, or give others."

    weight_map: dict[str, FileName]


@contextmanager
def naming(where: Path | str) -> Iterator[None]:
    """Let every UserError name the file that what is wrong stands in."""
    try:
        yield
    except UserError as error:
        if str(where) in error.what:
            raise
        raise UserError(f"{where}: {error.what}", error.hint) from error


def refuse_other_tensors(found: Mapping[str, Any], needed: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of a network: one missing, one too many, of another shape, or not finite.

    Raises:
        UserError: There is such a tensor; the first is named.
    """
    refuse_names(needed.keys() - found.keys(), found.keys() - needed.keys())
    for name, own in needed.items():
        value = found[name]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{name} is no plain tensor but a {type(value).__name__}", HINT)
        if value.shape != own.shape:
            refuse_other_shape(name, value.shape, own.shape)
        if value.is_floating_point() != own.is_floating_point():
            raise UserError(f"{name} is of type {value.dtype}, not {own.dtype}", HINT)
    refuse_not_finite(found.items())


def refuse_other_shape(name: str, there: Sequence[int], needed: Sequence[int]) -> NoReturn:
    """Say that a tensor has another shape than the network's."""
    raise UserError(f"{name} has the shape {tuple(there)}, not {tuple(needed)}", HINT)


def refuse_names(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse files that lack tensors of the network, or hold others.

    Raises:
        UserError: There are such; the first is named.
    """
    for names, what in ((sorted(missing), "lacks"), (sorted(unexpected), "holds")):
        if names:
            others = "" if what == "lacks" else " that the network does not have"
            raise UserError(f"{what} {len(names)} tensors{others}, the first of them {names[0]}", HINT)


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that hold NaN or infinities.

    Raises:
        UserError: One does; it is named.
    """
    for name, value in tensors:
        if not all_finite(value):
            raise UserError(f"{name} holds values that are no finite numbers", "Give weights that are undamaged.")


def all_finite(value: Tensor) -> bool:
    """Whether all values are finite, found out without a second tensor of that size."""
    if not value.is_floating_point() or not value.numel() or value.device.type == "meta":
        return True
    plain = value.detach().float() if value.element_size() == 1 else value.detach()
    return bool(torch.isfinite(torch.stack(torch.aminmax(plain))).all())


def read_index(path: Path) -> dict[str, str]:
    """In which file beside a weights index each tensor lies.

    Raises:
        UserError: It is no such index, or names files elsewhere.
    """
    return read_json(path, WeightsIndex)[0].weight_map


def safetensors_files(folder: Path, single: str) -> list[Path]:
    """The files that a folder's weights lie in: those that its index names, or the single one.

    Raises:
        UserError: The index is none, or names files elsewhere or that are not there.
    """
    index = folder / WEIGHTS_INDEX
    names = sorted(set(read_index(index).values())) if index.is_file() else [single]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} has no {missing[0]}", "Fetch the files again, or give others.")
    return [folder / name for name in names]


def weights_in(files: Iterable[Path]) -> tuple[int, int]:
    """How many tensors and how many weights safetensors files hold; none is read."""
    from safetensors import SafetensorError, safe_open

    tensors = weights = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118 - it is no mapping
                    tensors += 1
                    weights += torch.Size(source.get_slice(name).get_shape()).numel()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no safetensors file ({error})", "Give weights that are undamaged.") from error
    return tensors, weights
