"""Exports that were damaged, edited, or made by somebody else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.proactive.bad_inputs.case import PAYLOAD, Case, Place
from tests.proactive.bad_inputs.checkpoints import Edit, Payload, put, take, with_value

BAD = "export"
STATE, CONFIG, WEIGHTS = "proactive.json", "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
CODE = f"import os\nos.mkdir({PAYLOAD!r})\n"
Tensors = dict[str, torch.Tensor]


def changed(change: Callable[[Path], object]) -> Callable[[Place], None]:
    """Prepares a copy of the run's export, with something done to it."""

    def prepare(place: Place) -> None:
        folder = place.folder / BAD
        shutil.copytree(place.run / "export", folder)
        change(folder)

    return prepare


def text(name: str, content: str) -> Callable[[Place], None]:
    return changed(lambda folder: (folder / name).write_text(content, encoding="utf-8"))


def edited(name: str, edit: Edit) -> Callable[[Place], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        edit(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return changed(change)


def weights(edit: Callable[[Tensors], object]) -> Callable[[Place], None]:
    def change(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        edit(content)
        save_file(content, folder / WEIGHTS, metadata={"format": "pt"})

    return changed(change)


def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def edit(content: Tensors) -> None:
        name = next(iter(content))
        content[name] = change(content[name]).contiguous()

    return edit


def renamed(content: Tensors) -> None:
    name = next(iter(content))
    content[f"{name}x"] = content.pop(name)


def index(**names: str) -> Callable[[Path], None]:
    """Puts the weights outside the folder, and an index in it that names them there."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
        content = {"metadata": {}, "weight_map": dict.fromkeys(tensors, names["file"])}
        (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")

    return change


def header(folder: Path) -> None:
    """Cuts the weights within their header."""
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:100])


def with_code(folder: Path) -> None:
    """Lets the configuration ask for code that lies beside it."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    auto = {"AutoConfig": "code.Own", "AutoModelForSequenceClassification": "code.Own"}
    (folder / CONFIG).write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}), encoding="utf-8")
    (folder / "code.py").write_text(CODE, encoding="utf-8")


def pickled(folder: Path) -> None:
    """Puts the payload in place of the weights, as transformers once wrote them."""
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Payload()}, folder / "pytorch_model.bin")


DATA = "data"
TOKENIZER = (DATA, "tokenizer")
WRONG: list[tuple[str, str, Callable[[Place], None]]] = [
    ("state cut", STATE, text(STATE, '{"task": "rew')),
    ("state of nothing", STATE, text(STATE, "")),
    ("state of a list", STATE, text(STATE, "[]")),
    ("state of an empty object", "task", text(STATE, "{}")),
    ("state nested deep", STATE, text(STATE, "[" * 50_000 + "]" * 50_000)),
    ("state nested deep in a field", STATE, text(STATE, '{"model":' * 50_000)),
    ("state with a field twice", STATE, text(STATE, '{"task": "reward", "task": "agent"}')),
    ("state of bytes", STATE, changed(lambda folder: (folder / STATE).write_bytes(b"\xff\xfe\x00"))),
    ("task as a list", "task", edited(STATE, put("task", value=["reward"]))),
    ("task of the other kind", "reward", edited(STATE, put("task", value="agent"))),
    *((f"no {name}", name, edited(STATE, take(name))) for name in ("task", "model", "calibration", "data")),
    ("temperature as text", "temperature", edited(STATE, put("calibration", "temperature", value="hot"))),
    ("temperature 0", "temperature", edited(STATE, put("calibration", "temperature", value=0))),
    ("temperature NaN", "temperature", edited(STATE, put("calibration", "temperature", value=float("nan")))),
    ("calibration of a list", "calibration", edited(STATE, put("calibration", value=[]))),
    ("no training histories", "training_histories", edited(STATE, take(DATA, "training_histories"))),
    ("training histories of none", "training_histories", edited(STATE, put(DATA, "training_histories", value=[]))),
    ("tokenizer of nothing", "tokenizer", edited(STATE, put(*TOKENIZER, value={}))),
    ("tokenizer of no JSON", "tokenizer", edited(STATE, put(*TOKENIZER, "json", value="{"))),
    ("special token of nobody", "special", edited(STATE, put(*TOKENIZER, "special", "evil_token", value="<e>"))),
    ("padding token that is none", "<no>", edited(STATE, put(*TOKENIZER, "special", "pad_token", value="<no>"))),
    ("prompt of nothing", "prompt", edited(STATE, put(DATA, "prompt", value={}))),
    ("no such option", "no_such_option", edited(STATE, put("model", "no_such_option", value=1))),
    ("attention of a hub", "attn_implementation", edited(STATE, put("model", "attn_implementation", value="a/b"))),
    ("model as text", "model", edited(STATE, put("model", value="llama"))),
    ("base of text", "base", edited(STATE, put("base", value="llama"))),
    ("files elsewhere", "files", edited(STATE, put("files", value=["../run"]))),
    ("configuration cut", CONFIG, text(CONFIG, '{"model_type"')),
    ("configuration of a list", CONFIG, text(CONFIG, "[]")),
    ("configuration of no type", "model_type", text(CONFIG, "{}")),
    ("configuration of another type", "nosuch", edited(CONFIG, put("model_type", value="nosuch"))),
    ("configuration with attention of a hub", CONFIG, edited(CONFIG, put("attn_implementation", value="a/b"))),
    ("configuration of more layers", "lacks", edited(CONFIG, put("num_hidden_layers", value=3))),
    ("configuration of fewer layers", "contains", edited(CONFIG, put("num_hidden_layers", value=1))),
    ("configuration of very many layers", "layers", edited(CONFIG, put("num_hidden_layers", value=10**9))),
    ("configuration of very wide layers", "weights", edited(CONFIG, put("intermediate_size", value=10**9))),
    ("configuration of another width", "shape", edited(CONFIG, put("intermediate_size", value=48))),
    ("configuration of heads of none", "llama", edited(CONFIG, put("num_attention_heads", value=0))),
    ("configuration of a dtype that is none", BAD, edited(CONFIG, put("dtype", value="hot"))),
    ("no configuration", CONFIG, changed(lambda folder: (folder / CONFIG).unlink())),
    ("no weights", WEIGHTS, changed(lambda folder: (folder / WEIGHTS).unlink())),
    ("weights cut", WEIGHTS, changed(lambda folder: (folder / WEIGHTS).write_bytes(b"\x10" * 3))),
    ("weights cut within their header", WEIGHTS, changed(header)),
    ("weights without tensors", "0 tensors", weights(lambda content: content.clear())),
    ("weights without one tensor", "lacks", weights(lambda content: content.popitem())),
    ("a tensor renamed", "lacks", weights(renamed)),
    ("a tensor too many", "extra", weights(lambda content: content.update(extra=torch.ones(2)))),
    ("a tensor of NaN", "finite", weights(first(with_value(float("nan"))))),
    ("a tensor with an infinity", "finite", weights(first(with_value(float("-inf"))))),
    ("a tensor of another shape", "shape", weights(first(lambda weight: weight[:-1]))),
    ("an index of weights elsewhere", INDEX, changed(index(file="../elsewhere.safetensors"))),
    ("an index of weights at a path", INDEX, changed(index(file="/etc/passwd"))),
    ("an index of weights that are not there", "gone", changed(index(file="gone.safetensors"))),
    ("an index of text", INDEX, text(INDEX, "all")),
    ("an index of nothing", INDEX, text(INDEX, "{}")),
    ("a folder in place of the weights", WEIGHTS, changed(lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()))),
    ("an adapter's configuration beside the weights", "adapter_config.json", text("adapter_config.json", "{}")),
    ("a configuration that asks for code", BAD, changed(with_code)),
    ("a pickle in place of the weights", WEIGHTS, changed(pickled)),
]
EVALUATE = ["reward", f"--checkpoint={BAD}", "--quiet"]
EXPORT = [f"--checkpoint={BAD}", "--output=out"]
CASES = [
    *(Case(f"evaluate: {name}", "evaluate", EVALUATE, named, prepare) for name, named, prepare in WRONG),
    *(Case(f"export: {name}", "export", EXPORT, named, prepare) for name, named, prepare in WRONG[::5]),
    Case("export over it", "export", ["--checkpoint={run}", f"--output={BAD}"], "not an export", text(STATE, "{}")),
    Case("evaluate the export itself", "evaluate", EVALUATE, "", changed(lambda folder: None), accepted=True),
    Case(
        "one with code beside it that nothing asks for", "evaluate", EVALUATE, "", text("code.py", CODE), accepted=True
    ),
]
