"""What checkpoints and exports hold, as records: of a file nothing is used before it has been compared with them.

Files of this project can be damaged, and those of others can hold anything. So plain values have to fit a record, as
rows have to, and tensors have to be those of the network that the plain values describe, each by its name.
"""

import inspect
import json
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, Union

import torch
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    create_model,
    model_validator,
)
from torch import Tensor

from datamodules.errors import UserError
from datamodules.records import json_object, read_json, validate
from models.calibration import TEMPERATURE_RANGE

WEIGHTS_INDEX = "model.safetensors.index.json"
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def _file_name(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError("expected the name of a file beside it")
    return name


def _configuration(value: dict[str, Any]) -> dict[str, Any]:
    """A backbone's configuration; where it names code to fetch, as attention of a hub, it is refused."""
    if not isinstance(value.get("model_type"), str):
        raise ValueError("expected an object that names its model_type")
    for name in IMPLEMENTATIONS:
        _implementation(value.get(name))
    return value


def _implementation(value: Any) -> Any:
    if value is not None and (not isinstance(value, str) or "/" in value):
        raise ValueError("expected an implementation that transformers has, not code of a hub")
    return value


def _configuration_text(value: str) -> str:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("expected the text of a JSON object")
    _configuration(json_object(found))
    return value


def _without_private(value: Any) -> Any:
    """Without what Lightning notes for itself."""
    if isinstance(value, dict):
        return {name: option for name, option in value.items() if not str(name).startswith("_")}
    return value


Plain = Annotated[dict[str, Any], AfterValidator(json_object)]
Digest = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, AfterValidator(_file_name)]
ShardName = Annotated[str, Field(pattern=r"^(weights|optimizer)/[\w.-]+\.safetensors$")]
State = dict[str, Any]


class Content(BaseModel):
    """A record whose further fields are nobody's concern."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=False)
    hint: ClassVar[str] = "Give a checkpoint or an export as python -m proactive.fit wrote it."


class FittedCalibration(Content):
    """What `Calibration` keeps; older files say `threshold`, and not how many rows."""

    temperature: float = Field(ge=TEMPERATURE_RANGE[0] * 0.999, le=TEMPERATURE_RANGE[1] * 1.001)
    f1_threshold: float = Field(ge=0, le=1, validation_alias=AliasChoices("f1_threshold", "threshold"))
    rows: Count | None = None
    of_rows: Count | None = None


class SpecialTokens(Content):
    """The tokens that a tokenizer names; the one that pads is always there."""

    model_config = ConfigDict(extra="forbid")

    pad_token: str
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    sep_token: str | None = None
    cls_token: str | None = None
    mask_token: str | None = None


class KeptTokenizer(Content):
    """See `datamodules.tokenizer.tokenizer_state`; older files have no chat template."""

    text: str = Field(validation_alias="json")
    special: SpecialTokens
    chat_template: str | None = None


class DataOptions(Content):
    """The options of a data module that others than itself read."""

    root: str
    seed: Count


class KeptData(Content):
    """The state of a data module: what its model was trained on is always known, else nothing could be measured."""

    hyperparameters: DataOptions
    prompt: Plain
    tokenizer: KeptTokenizer
    branch_length: Count = 0
    training_histories: list[Digest] = Field(min_length=1)
    training_scenes: list[str] = Field(min_length=1)
    validation_histories: list[Digest] = []
    validation_scenes: list[str] = []
    training_rows: str
    order_seed: Count = 0


class AdapterBase(Content):
    """Which backbone an adapter is for."""

    backbone: str
    digest: str


class Configuration(RootModel[Annotated[dict[str, Any], AfterValidator(json_object), AfterValidator(_configuration)]]):
    """What config.json of a network holds."""

    hint: ClassVar[str] = Content.hint


class ExportContent(Content):
    """What proactive.json holds."""

    task: Literal["reward", "agent"]
    model: Plain
    calibration: FittedCalibration | None
    data: KeptData
    base: AdapterBase | None = None
    backbone_config: Annotated[Plain, AfterValidator(_configuration)] | None = None
    files: list[FileName] = []


class OptimizerContent(Content):
    """The state of an optimizer, as PyTorch keeps it."""

    class Group(Content):
        params: list[int | str]

    state: dict[int | str, Any]
    param_groups: list[Group]


class ScheduleContent(Content):
    """The state of a schedule, as PyTorch keeps it."""

    last_epoch: Count
    base_lrs: list[float]
    lr_lambdas: list[dict[str, Any] | None]
    step_count: Count = Field(validation_alias="_step_count")
    last_lr: list[float] = Field(validation_alias="_last_lr")


class RunOptions(Content):
    """The options of a run, by group."""

    seed_everything: Any
    model: Plain
    data: Plain
    trainer: Plain
    run: Plain


class CheckpointContent(Content):
    """What a checkpoint of a run holds, and values.pt of one that ranks wrote together."""

    task: Literal["reward", "agent"]
    version: str = Field(validation_alias="pytorch-lightning_version", pattern=r"^2\.\d+(\.\w+)*$")
    epoch: Count
    global_step: Count
    state_dict: dict[str, Any]
    hyper_parameters: Annotated[Plain, BeforeValidator(_without_private)]
    backbone_config: Annotated[str, AfterValidator(_configuration_text)]
    calibration: FittedCalibration | None
    base: AdapterBase | None = None
    options: RunOptions | None = None
    loops: dict[str, State] = {}
    callbacks: dict[str, State] = {}
    optimizer_states: list[OptimizerContent] = []
    lr_schedulers: list[ScheduleContent] = []

    @model_validator(mode="after")
    def _each_optimizer_has_its_schedule(self) -> Self:
        groups = [len(optimizer.param_groups) for optimizer in self.optimizer_states]
        if groups != [len(schedule.lr_lambdas) for schedule in self.lr_schedulers]:
            raise ValueError("expected a schedule for each group of optimizer_states in lr_schedulers")
        return self


class RewardCheckpoint(CheckpointContent):
    """That of a reward classifier, with the state of its data module under the name that Lightning gives it."""

    data: KeptData = Field(validation_alias="RewardDataModule")


class AgentCheckpoint(CheckpointContent):
    """The same of an agent."""

    data: KeptData = Field(validation_alias="AgentDataModule")


class ShardFiles(Content):
    """What values.pt holds of the files beside it, whose checksums it has, and of weights with several names."""

    files: dict[ShardName, Count]
    aliases: dict[str, str]


class WeightsIndex(Content):
    """In which file beside it each tensor lies."""

    hint: ClassVar[str] = "Fetch the files again, or give others."

    weight_map: dict[str, FileName]


CHECKPOINTS: dict[str, type[CheckpointContent]] = {"reward": RewardCheckpoint, "agent": AgentCheckpoint}


@cache
def options_record(kind: type) -> type[BaseModel]:
    """A record of the options that a class's constructor takes, with those that it hands on to its bases."""
    fields: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        # Those of libraries take no options, and may be wrapped while memory is tracked or weights are left out.
        if base.__module__.partition(".")[0] in ("builtins", "torch", "lightning") or "__init__" not in vars(base):
            continue
        constructor = vars(base)["__init__"]
        hints = typing.get_type_hints(constructor, include_extras=True)
        for name, parameter in inspect.signature(constructor).parameters.items():
            if name in hints and parameter.kind == parameter.POSITIONAL_OR_KEYWORD:
                default = ... if parameter.default is parameter.empty else parameter.default
                fields[name] = (_plain_type(hints[name]), default)
    if "attn_implementation" in fields:
        fields["attn_implementation"] = (Annotated[str | None, AfterValidator(_implementation)], None)
    settings = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    record: type[BaseModel] = create_model(f"{kind.__name__}Options", __config__=settings, **fields)
    record.hint = Content.hint  # type: ignore[attr-defined]
    return record


def _plain_type(annotation: Any) -> Any:
    """The type as JSON has it, where a dataclass is an object."""
    if typing.get_origin(annotation) in (Union, UnionType):
        return Union[tuple(map(_plain_type, typing.get_args(annotation)))]  # noqa: UP007 - of a computed tuple
    return options_record(annotation) if isinstance(annotation, type) and is_dataclass(annotation) else annotation


def refuse_options(kind: type, options: Mapping[str, Any], where: str) -> None:
    """Refuse options that a class does not have, or that are of other types.

    Raises:
        UserError: There are such; it names `where`.
    """
    validate(dict(options), options_record(kind), where)


@contextmanager
def naming(where: Path | str) -> Iterator[None]:
    """Let every UserError name the file that what is wrong stands in."""
    try:
        yield
    except UserError as error:
        if str(where) in error.what:
            raise
        raise UserError(f"{where}: {error.what}", error.hint) from error


# Tensors


def refuse_other_tensors(found: Mapping[str, Any], needed: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of a network: one missing, one too many, of another shape, or not finite.

    Raises:
        UserError: There is such a tensor; the first is named.
    """
    refuse_names(needed.keys() - found.keys(), found.keys() - needed.keys())
    for name, own in needed.items():
        value = found[name]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{name} is no plain tensor but a {type(value).__name__}", Content.hint)
        if value.shape != own.shape:
            refuse_other_shape(name, value.shape, own.shape)
        if value.is_floating_point() != own.is_floating_point():
            raise UserError(f"{name} is of type {value.dtype}, not {own.dtype}", Content.hint)
    refuse_not_finite(found.items())


def refuse_other_shape(name: str, there: Sequence[int], needed: Sequence[int]) -> NoReturn:
    """Say that a tensor has another shape than the network's."""
    raise UserError(f"{name} has the shape {tuple(there)}, not {tuple(needed)}", Content.hint)


def refuse_names(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse files that lack tensors of the network, or hold others.

    Raises:
        UserError: There are such; the first is named.
    """
    for names, what in ((sorted(missing), "lacks"), (sorted(unexpected), "holds")):
        if names:
            others = "" if what == "lacks" else " that the network does not have"
            raise UserError(f"{what} {len(names)} tensors{others}, the first of them {names[0]}", Content.hint)


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
