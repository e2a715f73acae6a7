"""Records of the contents of checkpoints and exports. A file is validated before anything in it is used.

Files of this project can be damaged, and other files can contain anything. So plain values are validated by a record,
like rows, and tensors must be exactly those of the network that the plain values describe.
"""

import inspect
import json
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union

import torch
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)
from torch import Tensor

from datamodules.corpus.json_records import validate
from datamodules.corpus.records import json_object
from models.learning.calibration import TEMPERATURE_RANGE, FittedOn
from models.networks.weight_files import HINT, FileName, checked_configuration, checked_implementation


def _configuration_text(value: str) -> str:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object as text")
    checked_configuration(json_object(found))
    return value


def _without_private(value: Any) -> Any:
    """Drop the private options of Lightning."""
    if isinstance(value, dict):
        return {name: option for name, option in value.items() if not str(name).startswith("_")}
    return value


Plain = Annotated[dict[str, Any], AfterValidator(json_object)]
Digest = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0)]
ShardName = Annotated[str, Field(pattern=r"^(weights|optimizer)/[\w.-]+\.safetensors$")]
State = dict[str, Any]


class Content(BaseModel):
    """A record that ignores unknown fields."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=False)
    hint: ClassVar[str] = HINT


class FittedCalibration(Content):
    """The fields of a `Calibration`. Older files have `threshold`, and not all of the other fields."""

    temperature: float = Field(ge=TEMPERATURE_RANGE[0] * 0.999, le=TEMPERATURE_RANGE[1] * 1.001)
    f1_threshold: float = Field(ge=0, le=1, validation_alias=AliasChoices("f1_threshold", "threshold"))
    rows: Count | None = None
    of_rows: Count | None = None
    fitted_on: FittedOn = "validation rows"


class SpecialTokens(Content):
    """The special tokens of a tokenizer. The padding token is required."""

    model_config = ConfigDict(extra="forbid")

    pad_token: str
    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    sep_token: str | None = None
    cls_token: str | None = None
    mask_token: str | None = None


class SavedTokenizer(Content):
    """See `datamodules.prompting.tokenizers.tokenizer_state`. Older files have no chat template."""

    text: str = Field(validation_alias="json")
    special: SpecialTokens
    chat_template: str | None = None


class SavedChat(Content):
    """The fields of `datamodules.prompting.chat_format.Chat`."""

    model_config = ConfigDict(extra="forbid")

    system: str
    user: str
    after: str
    end_token: str | None
    lead: Annotated[str, Field(pattern=r"^\s*$")]


class DataOptions(Content):
    """The options of a data module that other code reads."""

    root: str
    seed: Count


class SavedData(Content):
    """The state of a data module. The training histories and scenes are required, because evaluations need them."""

    hyperparameters: DataOptions
    prompt: Plain
    chat: SavedChat | None = None  # older files have none, and their format is plain
    tokenizer: SavedTokenizer
    branch_length: Count = 0
    training_histories: list[Digest] = Field(min_length=1)
    training_scenes: list[str] = Field(min_length=1)
    validation_histories: list[Digest] = []
    validation_scenes: list[str] = []
    training_rows: str
    order_seed: Count = 0


class SavedBase(Content):
    """The fields of `models.networks.adapter_files.AdapterBase`."""

    backbone: str
    digest: str


class ExportContent(Content):
    """The content of proactive.json."""

    task: Literal["reward", "agent", "preference", "online"]
    model: Plain
    calibration: FittedCalibration | None
    data: SavedData
    base: SavedBase | None = None
    backbone_config: Annotated[Plain, AfterValidator(checked_configuration)] | None = None
    files: list[FileName] = []


class OptimizerContent(Content):
    """The state dict of an optimizer of PyTorch."""

    class Group(Content):
        params: list[int | str]

    state: dict[int | str, Any]
    param_groups: list[Group]


class ScheduleContent(Content):
    """The state dict of a schedule of PyTorch."""

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


class RunTime(Content):
    """When a run started, in ISO format with its time zone, and how many seconds it has trained."""

    started: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")
    seconds: float = Field(ge=0, allow_inf_nan=False)


class CheckpointContent(Content):
    """The content of a checkpoint file, and of values.pt in a sharded checkpoint."""

    task: Literal["reward", "agent", "preference", "online"]
    version: str = Field(validation_alias="pytorch-lightning_version", pattern=r"^2\.\d+(\.\w+)*$")
    epoch: Count
    global_step: Count
    state_dict: dict[str, Any]
    hyper_parameters: Annotated[Plain, BeforeValidator(_without_private)]
    backbone_config: Annotated[str, AfterValidator(_configuration_text)]
    calibration: FittedCalibration | None
    base: SavedBase | None = None
    options: RunOptions | None = None
    run_time: RunTime | None = None
    loops: dict[str, State] = {}
    callbacks: dict[str, State] = {}
    optimizer_states: list[OptimizerContent] = []
    lr_schedulers: list[ScheduleContent] = []

    @model_validator(mode="after")
    def _each_optimizer_has_its_schedule(self) -> Self:
        groups = [len(optimizer.param_groups) for optimizer in self.optimizer_states]
        if groups != [len(schedule.lr_lambdas) for schedule in self.lr_schedulers]:
            raise ValueError("expected a schedule in lr_schedulers for each group of optimizer_states")
        return self


class RewardCheckpoint(CheckpointContent):
    """The checkpoint of a reward classifier. Lightning names the state of the data module after its class."""

    data: SavedData = Field(validation_alias="RewardDataModule")


class AgentCheckpoint(CheckpointContent):
    """The checkpoint of an agent."""

    data: SavedData = Field(validation_alias="AgentDataModule")


def _log_probability(value: Any) -> Any:
    sound = isinstance(value, Tensor) and value.dtype == torch.float64 and value.dim() == 1
    if not sound or not bool((value <= 0).all()):  # false for NaN as well
        raise ValueError("expected a float64 tensor (N,) of log-probabilities")
    return value


class SavedReference(Content):
    """The log-probabilities of the rows of a split before preference training, and the digest of the rows."""

    rows: str
    log_probability: Annotated[Any, AfterValidator(_log_probability)]


class PreferenceCheckpoint(CheckpointContent):
    """The checkpoint of an agent that learned from judged proposals."""

    data: SavedData = Field(validation_alias="PreferenceDataModule")
    reference: dict[Literal["train", "validation", "test"], SavedReference]


class OnlineCheckpoint(CheckpointContent):
    """The checkpoint of an agent that learned from rewards, and the digests of the judges that gave them."""

    data: SavedData = Field(validation_alias="HistoryDataModule")
    judges: dict[Literal["judge", "held_out_judge"], str]
    constant_steps: Count


class ShardFiles(Content):
    """The fields of values.pt about files and names: checksums of files with shards, and names of tied weights."""

    files: dict[ShardName, Count]
    aliases: dict[str, str]


@cache
def options_record(kind: type) -> type[BaseModel]:
    """A record of the options of a class's constructor, including those of its base classes."""
    fields: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        # Constructors of libraries have no such options. While memory is tracked, they may be wrapped.
        if base.__module__.partition(".")[0] in ("builtins", "torch", "lightning") or "__init__" not in vars(base):
            continue
        constructor = vars(base)["__init__"]
        hints = typing.get_type_hints(constructor, include_extras=True)
        for name, parameter in inspect.signature(constructor).parameters.items():
            if name in hints and parameter.kind == parameter.POSITIONAL_OR_KEYWORD:
                default = ... if parameter.default is parameter.empty else parameter.default
                fields[name] = (_plain_type(hints[name]), default)
    if "attn_implementation" in fields:
        fields["attn_implementation"] = (Annotated[str | None, AfterValidator(checked_implementation)], None)
    settings = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    record: type[BaseModel] = create_model(f"{kind.__name__}Options", __config__=settings, **fields)
    record.hint = Content.hint  # type: ignore[attr-defined]
    return record


def _plain_type(annotation: Any) -> Any:
    """The type of the value in JSON, where a dataclass is an object."""
    if typing.get_origin(annotation) in (Union, UnionType):
        return Union[tuple(map(_plain_type, typing.get_args(annotation)))]  # noqa: UP007 - the tuple is computed
    return options_record(annotation) if isinstance(annotation, type) and is_dataclass(annotation) else annotation


def refuse_options(kind: type, options: Mapping[str, Any], where: str) -> None:
    """Refuse options that a class does not have, or that have other types.

    Args:
        kind: The class.
        options: The options, from a file.
        where: The file or field that they are from.

    Raises:
        UserError: There is such an option. The message begins with `where`.
    """
    validate(dict(options), options_record(kind), where)
