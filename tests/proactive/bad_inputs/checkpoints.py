"""Checkpoints that were damaged, edited, or made by somebody else."""

import json
import os
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from tests.proactive.bad_inputs.case import PAYLOAD, Case, Place

BAD = "bad.ckpt"
Edit = Callable[[dict[str, Any]], object]
DATA = "RewardDataModule"


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (PAYLOAD,)


def itself() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["itself"] = found
    return found


def put(*path: str, value: Any) -> Edit:
    """Puts a value where a path of keys leads."""

    def edit(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return edit


def take(*path: str) -> Edit:
    """Takes away what a path of keys leads to."""

    def edit(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return edit


def configured(**options: Any) -> Edit:
    """Gives the backbone's configuration other values."""

    def edit(content: dict[str, Any]) -> None:
        content["backbone_config"] = json.dumps(json.loads(content["backbone_config"]) | options)

    return edit


def first_weight(change: Callable[[torch.Tensor], Any]) -> Edit:
    """Changes the first tensor."""

    def edit(content: dict[str, Any]) -> None:
        name = next(iter(content["state_dict"]))
        content["state_dict"][name] = change(content["state_dict"][name])

    return edit


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.clone()
        weight.view(-1)[7] = value
        return weight

    return change


def renamed(content: dict[str, Any]) -> None:
    weights = content["state_dict"]
    name = next(iter(weights))
    weights[f"{name}x"] = weights.pop(name)


def saved(edit: Edit) -> Callable[[Place], None]:
    """Prepares a copy of the run's last checkpoint, edited."""

    def prepare(place: Place) -> None:
        content = torch.load(place.run / "checkpoints" / "last.ckpt", weights_only=True)
        edit(content)
        torch.save(content, place.folder / BAD)

    return prepare


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Place], None]:
    """Prepares a copy of it with other bytes."""
    return lambda place: (place.folder / BAD).write_bytes(  # type: ignore[return-value]
        change((place.run / "checkpoints" / "last.ckpt").read_bytes())
    )


def other_pickle(place: Place) -> None:
    """Puts the payload where the archive keeps what describes the tensors, with the right checksum."""
    import pickle

    with (
        zipfile.ZipFile(place.run / "checkpoints" / "last.ckpt") as archive,
        zipfile.ZipFile(place.folder / BAD, "w") as other,
    ):
        for name in archive.namelist():
            other.writestr(name, pickle.dumps(Payload()) if name.endswith("data.pkl") else archive.read(name))


TOKENIZER = (DATA, "tokenizer")
CHAT = {"system": "", "user": "", "after": "", "end_token": None, "lead": ""}
# What is wrong, what the message names, and how a checkpoint comes to be so: whatever reads it refuses it.
WRONG: list[tuple[str, str, Edit]] = [
    *(
        (f"no {name}", name, take(name))
        for name in ("state_dict", "hyper_parameters", "backbone_config", "calibration", "task", "epoch", DATA)
    ),
    ("no version", "pytorch-lightning_version", take("pytorch-lightning_version")),
    ("version of a list", "pytorch-lightning_version", put("pytorch-lightning_version", value=[2])),
    ("version of long ago", "pytorch-lightning_version", put("pytorch-lightning_version", value="0.9.0")),
    ("task as a list", "task", put("task", value=["reward"])),
    ("task of nobody", "task", put("task", value="sing")),
    ("negative step", "global_step", put("global_step", value=-4)),
    ("step of text", "global_step", put("global_step", value="many")),
    ("options of the model as text", "hyper_parameters", put("hyper_parameters", value="all")),
    ("configuration of no JSON", "backbone_config", put("backbone_config", value="{")),
    ("configuration of a list", "backbone_config", put("backbone_config", value="[]")),
    ("configuration as a mapping", "backbone_config", put("backbone_config", value={"model_type": "llama"})),
    ("configuration nested deep", "backbone_config", put("backbone_config", value="[" * 50_000)),
    ("configuration of no type", "model_type", put("backbone_config", value='{"hidden_size": 32}')),
    ("attention of a hub", "backbone_config", configured(attn_implementation="somebody/attention")),
    ("calibration as text", "calibration", put("calibration", value="hot")),
    ("temperature as text", "temperature", put("calibration", "temperature", value="hot")),
    ("temperature 0", "temperature", put("calibration", "temperature", value=0.0)),
    ("temperature below 0", "temperature", put("calibration", "temperature", value=-1.0)),
    ("temperature NaN", "temperature", put("calibration", "temperature", value=float("nan"))),
    ("temperature infinite", "temperature", put("calibration", "temperature", value=float("inf"))),
    ("no temperature", "temperature", take("calibration", "temperature")),
    ("threshold 2", "threshold", put("calibration", "f1_threshold", value=2.0)),
    ("threshold NaN", "threshold", put("calibration", "f1_threshold", value=float("nan"))),
    ("calibrated on -1 rows", "rows", put("calibration", "rows", value=-1)),
    ("state of the data as a list", DATA, put(DATA, value=[])),
    ("no training histories", "training_histories", take(DATA, "training_histories")),
    ("training histories of none", "training_histories", put(DATA, "training_histories", value=[])),
    ("training histories of text", "training_histories", put(DATA, "training_histories", value=["a"])),
    ("training histories too great", "training_histories", put(DATA, "training_histories", value=[2**70])),
    ("no training scenes", "training_scenes", take(DATA, "training_scenes")),
    ("validation histories null", "validation_histories", put(DATA, "validation_histories", value=None)),
    ("no training rows", "training_rows", take(DATA, "training_rows")),
    ("no options of the data", "hyperparameters", take(DATA, "hyperparameters")),
    ("root as a number", "root", put(DATA, "hyperparameters", "root", value=3)),
    ("no prompt", "prompt", take(DATA, "prompt")),
    ("prompt as text", "prompt", put(DATA, "prompt", value="Well?")),
    ("chat as text", "chat", put(DATA, "chat", value="on")),
    ("chat without its parts", "system", put(DATA, "chat", value={})),
    ("a chat's part of nobody", "evil", put(DATA, "chat", value={**CHAT, "evil": "x"})),
    ("a chat's answers begin with text", "lead", put(DATA, "chat", value={**CHAT, "lead": "x"})),
    ("tokenizer of nothing", "tokenizer", put(*TOKENIZER, value={})),
    ("tokenizer as text", "tokenizer", put(*TOKENIZER, value="bpe")),
    ("no special tokens", "special", take(*TOKENIZER, "special")),
    ("special token of a number", "pad_token", put(*TOKENIZER, "special", "pad_token", value=0)),
    ("no padding token", "pad_token", take(*TOKENIZER, "special", "pad_token")),
    ("special token of nobody", "evil_token", put(*TOKENIZER, "special", "evil_token", value="<e>")),
    ("template of a number", "chat_template", put(*TOKENIZER, "chat_template", value=1)),
    ("room below 0", "branch_length", put(DATA, "branch_length", value=-5)),
    ("an adapter's base of a list", "base", put("base", value=[1])),
    ("names that are no text", "hyper_parameters", put("hyper_parameters", value={(1, 2): 3})),
    ("what holds itself", "hyper_parameters", put("hyper_parameters", value=itself())),
    ("weights as a list", "state_dict", put("state_dict", value=[1, 2])),
]
# The same, of what is used where a model is made of a checkpoint.
UNUSABLE: list[tuple[str, str, Edit]] = [
    ("no weights", "tensors", put("state_dict", value={})),
    ("a tensor missing", "lacks", lambda content: content["state_dict"].popitem()),
    ("a tensor too many", "extra", put("state_dict", "extra", value=torch.ones(2))),
    ("a tensor renamed", "lacks", renamed),
    ("a tensor of another shape", "shape", first_weight(lambda weight: weight[:-1].clone())),
    ("a tensor transposed", "shape", first_weight(lambda weight: weight.T)),
    ("a tensor of NaN", "finite", first_weight(with_value(float("nan")))),
    ("a tensor with an infinity", "finite", first_weight(with_value(float("inf")))),
    ("text in place of a tensor", "plain tensor", first_weight(lambda weight: "weight")),
    ("a sparse tensor", "plain tensor", first_weight(lambda weight: weight.to_sparse())),
    ("a tensor of whole numbers", "type", first_weight(lambda weight: weight.long())),
    ("a tensor on no device", "plain tensor", first_weight(lambda weight: weight.to("meta"))),
    ("more layers", "lacks", configured(num_hidden_layers=3)),
    ("fewer layers", "contains", configured(num_hidden_layers=1)),
    ("very many layers", "layers", configured(num_hidden_layers=10**9)),
    ("very wide layers", "weights", configured(hidden_size=10**7, head_dim=16)),
    ("a width of text", "llama", configured(hidden_size="wide")),
    ("heads of none", "llama", configured(num_attention_heads=0)),
    ("no such type of model", "nosuch", configured(model_type="nosuch")),
    ("another type of model", "the configuration", configured(model_type="t5gemma", hidden_size=32)),
    ("no such activation", "nosuch", configured(hidden_act="nosuch")),
    ("no such option", "no_such_option", put("hyper_parameters", "no_such_option", value=1)),
    ("no such pooling", "pooling", put("hyper_parameters", "pooling", value="deep")),
    ("dtype of code", "dtype", put("hyper_parameters", "dtype", value="os.system")),
    ("a rate of text", "learning_rate", put("hyper_parameters", "learning_rate", value="fast")),
    ("dropout of 2", "dropout", put("hyper_parameters", "dropout", value=2.0)),
    (
        "attention of a hub as option",
        "attn_implementation",
        put("hyper_parameters", "attn_implementation", value="a/b"),
    ),
    ("an adapter of rank 0", "rank", put("hyper_parameters", "adapter", value={"rank": 0})),
    ("an adapter of text", "adapter", put("hyper_parameters", "adapter", value="lora")),
    ("an adapter with no base", "base", put("hyper_parameters", "adapter", value={"rank": 2})),
    ("quantized without an adapter", "quantization", put("hyper_parameters", "quantization", value="nf4")),
    ("no such option of the data", "no_such_option", put(DATA, "hyperparameters", "no_such_option", value=1)),
    ("a batch of text", "batch_size", put(DATA, "hyperparameters", "batch_size", value="8")),
    ("a batch of none", "batch_size", put(DATA, "hyperparameters", "batch_size", value=0)),
    ("a prompt without its parts", "prompt", put(DATA, "prompt", value={})),
    ("a prompt with an unknown place", "prompt", put(DATA, "prompt", "event", value="{event} {secret}")),
    ("a format of nobody", "format", put(DATA, "hyperparameters", "format", value="loud")),
    ("a chat that ends in no token", "<end>", put(DATA, "chat", value={**CHAT, "end_token": "<end>"})),
    ("a tokenizer of no JSON", "tokenizer", put(*TOKENIZER, "json", value="{")),
    ("a tokenizer of nothing inside", "tokenizer", put(*TOKENIZER, "json", value="{}")),
    ("a padding token that is none", "<nothing>", put(*TOKENIZER, "special", "pad_token", value="<nothing>")),
]
# What is used where a run goes on.
LOST: list[tuple[str, str, Edit]] = [
    *((f"no {name}", name, take(name)) for name in ("loops", "callbacks", "optimizer_states", "lr_schedulers")),
    ("no options of the run", "options", take("options")),
    ("options of the run as text", "options", put("options", value="all")),
    ("options without the trainer's", "trainer", take("options", "trainer")),
    ("progress as a list", "loops", put("loops", value=[])),
    ("progress of nothing", "loops", put("loops", value={})),
    ("progress without its epochs", "loops", take("loops", "fit_loop", "epoch_progress")),
    ("progress below 0", "loops", put("loops", "fit_loop", "epoch_progress", "current", "completed", value=-1)),
    ("progress of text", "loops", put("loops", "fit_loop", "epoch_loop.batch_progress", "total", value="all")),
    ("states of callbacks as a list", "callbacks", put("callbacks", value=[])),
    ("a callback's state as text", "callbacks", put("callbacks", value={"BestCheckpoint": "good"})),
    ("optimizers as text", "optimizer_states", put("optimizer_states", value="adam")),
    ("no optimizer", "optimizer_states", put("optimizer_states", value=[])),
    (
        "an optimizer without groups",
        "optimizer_states",
        lambda content: content["optimizer_states"][0].pop("param_groups"),
    ),
    (
        "an optimizer of one group",
        "optimizer_states",
        lambda content: (
            content["optimizer_states"][0]["param_groups"].pop(),
            content["lr_schedulers"][0]["lr_lambdas"].pop(),
        ),
    ),
    (
        "moments of another shape",
        "optimizer_states",
        lambda content: content["optimizer_states"][0]["state"][0].update(exp_avg=torch.ones(3)),
    ),
    (
        "moments missing",
        "optimizer_states",
        lambda content: content["optimizer_states"][0]["state"][0].pop("exp_avg_sq"),
    ),
    (
        "other betas",
        "optimizer_states",
        lambda content: content["optimizer_states"][0]["param_groups"][0].update(betas="high"),
    ),
    ("a schedule without a step", "lr_schedulers", lambda content: content["lr_schedulers"][0].pop("last_epoch")),
    ("a schedule of text", "lr_schedulers", put("lr_schedulers", value=["linear"])),
]
BYTES: list[tuple[str, Callable[[Place], None]]] = [
    ("nothing", rewritten(lambda content: b"")),
    ("a half", rewritten(lambda content: content[: len(content) // 2])),
    ("all but a byte", rewritten(lambda content: content[:-1])),
    ("a flipped bit", rewritten(lambda content: content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])),
    ("text", rewritten(lambda content: b"not a checkpoint")),
    ("a folder", lambda place: (place.folder / BAD).mkdir()),
    ("a list", lambda place: torch.save([1, 2], place.folder / BAD)),
    ("a payload", lambda place: torch.save({"task": Payload()}, place.folder / BAD)),
    (
        "an old file with a payload",
        lambda place: torch.save({"task": Payload()}, place.folder / BAD, _use_new_zipfile_serialization=False),
    ),
    ("a payload among the weights", saved(put("state_dict", "extra", value=Payload()))),
    ("a payload among the options", saved(put("hyper_parameters", "scratch", value=Payload()))),
    ("a payload in the archive", other_pickle),
]
EVALUATE = ["reward", f"--checkpoint={BAD}", "--quiet"]
EXPORT = [f"--checkpoint={BAD}", "--output=out"]
RESUME = [f"--ckpt_path={BAD}"]
CASES = [
    *(Case(f"evaluate {name}", "evaluate", EVALUATE, named, saved(edit)) for name, named, edit in WRONG + UNUSABLE),
    *(Case(f"export {name}", "export", EXPORT, named, saved(edit)) for name, named, edit in (WRONG + UNUSABLE)[::4]),
    *(Case(f"resume {name}", "fit", RESUME, named, saved(edit)) for name, named, edit in WRONG[::2] + LOST),
    *(Case(f"resume with {name}", "fit", RESUME, named, saved(edit)) for name, named, edit in UNUSABLE[:12:3]),
    *(Case(f"evaluate {name} in a checkpoint's place", "evaluate", EVALUATE, BAD, prepare) for name, prepare in BYTES),
    *(Case(f"resume {name} in a checkpoint's place", "fit", RESUME, BAD, prepare) for name, prepare in BYTES[::2]),
    Case("evaluate the checkpoint itself", "evaluate", EVALUATE, "", saved(lambda content: None), accepted=True),
]
