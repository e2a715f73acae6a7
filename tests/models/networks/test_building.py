"""Building networks: pretrained, from scratch, from exports; refused files and options; no code from a folder."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedTokenizerFast

from datamodules.backbones.quiet import quiet_transformers
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import load_tokenizer
from models.networks.building import base_from_config, build_network, load_network, pretrained_network
from models.networks.configurations import (
    LABELS,
    SCRATCH_CONFIG,
    max_positions,
    meta_network,
    network_config,
    network_from_config,
)
from models.networks.distributed_loading import WeightFiles
from models.networks.heads import class_layer
from models.networks.network_options import Head, NetworkOptions
from tests.models.networks.test_heads import READ_OUT, build
from tests.models.small import FAMILIES, SMALL_LLAMA


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A small Llama-type classifier with its tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("saved")
    with quiet_transformers():
        build_network(small_llama(), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that a test can damage."""
    return Path(shutil.copytree(saved, tmp_path / "backbone"))


def small_llama(**changes: Any) -> NetworkOptions:
    return NetworkOptions("classifier", scratch=SMALL_LLAMA | changes)


def test_a_classifier_is_no_language_model(saved: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="saved0 is a classifier, not a language model"):
        build_network(NetworkOptions("language model", str(saved)), tokenizer)


def test_scratch_is_a_llama_with_a_few_million_parameters(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_network(NetworkOptions("classifier"), tokenizer)
    assert SCRATCH_CONFIG["model_type"] == model.config.model_type == "llama"
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.id2label == LABELS == {0: "rejected", 1: "accepted"}
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("load", ["build", "load"])
def test_a_local_folder_is_loaded_with_its_weights(load: str, saved: Path) -> None:
    path = str(saved)
    if load == "build":
        model = build_network(NetworkOptions("classifier", path), load_tokenizer(path))
    else:
        model = load_network("classifier", path)
    weights = load_file(saved / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in weights.items())


def test_a_backbone_without_a_head_gets_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    body = build("bert", tokenizer).base_model
    with quiet_transformers():
        body.save_pretrained(tmp_path)
    model = build_network(NetworkOptions("classifier", str(tmp_path)), tokenizer)
    found, wanted = (part.embeddings.word_embeddings.weight for part in (model.base_model, body))
    assert torch.equal(found, wanted)
    assert class_layer(model).out_features == 2


@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_head_with_another_number_of_classes_is_replaced(
    family: str, classes: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Reward models have one class, entailment models three. The backbone's weights are kept, also when sharded."""
    config = transformers.AutoConfig.for_model(
        family, **FAMILIES[family], vocab_size=len(tokenizer), pad_token_id=0, num_labels=classes
    )
    with quiet_transformers():
        saved = transformers.AutoModelForSequenceClassification.from_config(config)
        saved.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "proactive"):
        model = build_network(NetworkOptions("classifier", str(tmp_path)), tokenizer)
    assert class_layer(model).out_features == model.config.num_labels == 2
    assert model.config.id2label == LABELS
    head = READ_OUT[family]
    kept = {name for name in saved.state_dict() if not name.startswith(head)}
    assert all(torch.equal(model.state_dict()[name], saved.state_dict()[name]) for name in kept)
    assert 0 < float(class_layer(model).weight.detach().std()) < 0.1
    assert f"has the shape ({classes}, 16), not (2, 16): the head is a new one, of 2 classes" in caplog.text
    options = NetworkOptions("classifier", str(tmp_path))
    files = WeightFiles.of(meta_network(options, network_config(options, tokenizer)), options)
    assert set(files.keys) == set(files.files) == kept


PICTURES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": {**PICTURES, "image_size": 28, "patch_size": 14}},
    "llava": {"vision_config": {**PICTURES, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}},
    "mistral3": {"vision_config": {**PICTURES, "model_type": "pixtral", "image_size": 28, "patch_size": 14}},
    "smolvlm": {"vision_config": {**PICTURES, "image_size": 28, "patch_size": 14}},
}
TEXT_TYPES = {"gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral", "smolvlm": "llama"}


@pytest.mark.parametrize("head", get_args(Head))
@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_text_part_of_a_network_for_text_and_images_is_used(
    family: str, head: Head, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text_type = TEXT_TYPES[family]
    text = {**FAMILIES[text_type], "model_type": text_type, "vocab_size": len(tokenizer), "pad_token_id": 0}
    tied = {"tie_word_embeddings": False}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, text_config=text | tied, **MULTIMODAL[family], **tied)
    with quiet_transformers():
        whole = transformers.AutoModelForImageTextToText.from_config(config).eval()
        whole.save_pretrained(tmp_path / "whole")
    model = build_network(NetworkOptions(head, str(tmp_path / "whole")), tokenizer).eval()
    assert model.config.model_type == text_type
    ids_1T = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected_TD = getattr(whole.model, "language_model", None) or whole.model.text_model
        torch.testing.assert_close(
            model.base_model(ids_1T).last_hidden_state, expected_TD(input_ids=ids_1T).last_hidden_state
        )
        if head == "language model":
            torch.testing.assert_close(model(ids_1T).logits, whole(input_ids=ids_1T).logits)
    with quiet_transformers():
        model.save_pretrained(tmp_path / "text")
    assert load_file(tmp_path / "text" / "model.safetensors").keys() == model.state_dict().keys()
    again = load_network(head, str(tmp_path / "text"))
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    left = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickle_behind_an_index(folder: Path) -> None:
    """Let an index of safetensors name a pickle file."""
    pickle_only(folder)
    names = torch.load(folder / "pytorch_model.bin", weights_only=True)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    torch.save({"payload": Payload(folder.parent / "executed")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Payload:
    """Creates a file if a pickle with it is loaded without weights_only."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda folder: shutil.rmtree(folder), id="missing"),
        pytest.param(lambda folder: (folder / "model.safetensors").unlink(), id="no weights"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{"), id="configuration cut short"),
        pytest.param(lambda folder: configure(folder, model_type="no-such-type"), id="unknown type"),
        pytest.param(lambda folder: configure(folder, intermediate_size=48), id="weights of another shape"),
        pytest.param(lambda folder: configure(folder, vocab_size=100), id="fewer embeddings than tokens"),
        pytest.param(lambda folder: configure(folder, hidden_size="big"), id="wrong kind of value"),
        pytest.param(cut_short, id="weights cut short"),
        pytest.param(drop_a_layer, id="a layer is missing"),
        pytest.param(pickle_only, id="pickle only"),
        pytest.param(pickle_behind_an_index, id="pickle behind an index"),
    ],
)
def test_an_unusable_folder_gives_a_user_error(
    spoil: Callable[[Path], None], folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    spoil(folder)
    with pytest.raises(UserError) as error:
        build_network(NetworkOptions("classifier", str(folder)), tokenizer)
    assert str(folder) in error.value.what
    assert error.value.hint
    assert "\n" not in error.value.what + error.value.hint
    assert not (folder.parent / "executed").exists()


@pytest.mark.parametrize("spoil", [cut_short, pickle_only, pickle_behind_an_index])
def test_an_unreadable_export_is_refused(spoil: Callable[[Path], None], folder: Path) -> None:
    spoil(folder)
    with pytest.raises(UserError, match="backbone"):
        load_network("classifier", str(folder))
    assert not (folder.parent / "executed").exists()


def test_an_unreachable_hub_id_is_named_in_the_error(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what no network looks like, at once
    with pytest.raises(UserError, match="nobody/no-such-model"):
        build_network(NetworkOptions("classifier", "nobody/no-such-model"), tokenizer)


def test_a_network_for_images_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with quiet_transformers():
        transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        build_network(NetworkOptions("classifier", str(tmp_path)), tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no-such-type"},
        {"model_type": "mamba"},
        {"hidden_size": "big"},
        {"num_attention_heads": 3},
        {"vocab_size": 20},
    ],
    ids=["unknown type", "no classifier of this type", "wrong kind of value", "sizes do not fit", "small vocabulary"],
)
def test_an_invalid_scratch_configuration_gives_a_user_error(
    changes: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError):
        build_network(small_llama(**changes), tokenizer)


def test_an_unknown_attention_gives_a_user_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="attn_implementation"):
        build_network(replace(small_llama(), attn_implementation="no-such-attention"), tokenizer)


CODE = """
from pathlib import Path
from torch import nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast
Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = {model_type!r}
class Model(PreTrainedModel):
    config_class = Config
    base_model_prefix = "model"
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, model_type: str) -> Path:
    """Let a folder name its own code for configuration, model and tokenizer; return the file that this code creates."""
    marker = folder.parent / "executed"
    (folder / "custom.py").write_text(CODE.format(marker=str(marker), model_type=model_type))
    parts = {"AutoConfig": "custom.Config", "AutoModelForSequenceClassification": "custom.Model"}
    configure(folder, model_type=model_type, auto_map=parts)
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "custom.Tokenizer"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    return marker


LOADERS: dict[str, Callable[[Path, PreTrainedTokenizerFast], object]] = {
    "backbone": lambda folder, tokenizer: build_network(NetworkOptions("classifier", str(folder)), tokenizer),
    "export": lambda folder, tokenizer: load_network("classifier", str(folder)),
    "checkpoint": lambda folder, tokenizer: network_from_config(
        NetworkOptions("classifier"), json.loads((folder / "config.json").read_text())
    ),
    "tokenizer": lambda folder, tokenizer: load_tokenizer(str(folder)),
}


@pytest.mark.parametrize("model_type", ["own-type", "llama"])
@pytest.mark.parametrize("loader", LOADERS)
def test_code_in_a_folder_is_not_run_by_default(
    loader: str, model_type: str, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """If transformers knows the model type, its own code is used. Otherwise the folder is refused."""
    marker = with_code(folder, model_type)
    try:
        LOADERS[loader](folder, tokenizer)
    except UserError:
        assert model_type == "own-type" or loader == "tokenizer"
    else:
        assert model_type == "llama" or loader == "tokenizer"
    assert not marker.exists()


@pytest.mark.parametrize("loader", ["backbone", "tokenizer"])
def test_code_in_a_folder_is_run_with_trust_remote_code(
    loader: str, folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also shows that the test above would detect code that runs."""
    marker = with_code(folder, "own-type")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    monkeypatch.syspath_prepend(str(folder.parent / "modules"))
    if loader == "backbone":
        model = build_network(NetworkOptions("classifier", str(folder), trust_remote_code=True), tokenizer)
        assert type(model).__name__ == "Model"
    else:
        load_tokenizer(str(folder), trust_remote_code=True)
    assert marker.exists()


def test_code_in_the_base_of_an_adapter_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the options of its checkpoint say so. Without `base_from_config`, the same options run it."""
    marker = with_code(folder, "llama")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    monkeypatch.syspath_prepend(str(folder.parent / "modules"))
    config = json.loads((folder / "config.json").read_text())
    options = NetworkOptions("classifier", str(folder), trust_remote_code=True)
    assert type(base_from_config(options, config)).__module__.startswith("transformers.models.llama.")
    assert not marker.exists()
    pretrained_network(options, AutoConfig.for_model(**config))
    assert marker.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_stored_in_the_given_dtype(dtype: Any, saved: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for model in (
        build_network(replace(small_llama(), dtype=dtype), tokenizer),
        build_network(NetworkOptions("classifier", str(saved), dtype=dtype), tokenizer),
        network_from_config(NetworkOptions("classifier", dtype=dtype), json.loads((saved / "config.json").read_text())),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("positions", "rotary", "room"),
    [
        (512, {"rope_type": "default"}, 512),
        (512, {"rope_type": "yarn", "factor": 4.0}, 2048),  # as Qwen 2.5 has it
        (512, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        (2048, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),  # as DeepSeek
        (512, {"rope_type": "linear", "factor": 2.0}, 1024),
        (512, {"rope_type": "dynamic", "factor": 2.0}, 1024),
        (4096, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512}, 4096),
    ],
)  # fmt: skip
def test_max_positions_includes_the_factor_of_stretched_rotary_positions(
    positions: int, rotary: dict[str, Any], room: int
) -> None:
    options = {**SMALL_LLAMA, "max_position_embeddings": positions, "rope_parameters": {"rope_theta": 1e4, **rotary}}
    assert max_positions(transformers.AutoConfig.for_model(**options)) == room


def test_a_folder_with_a_named_pipe_is_refused(tmp_path: Path) -> None:
    """Reading it would block forever."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"model.backbone: .*config.json: is a named pipe"):
        network_config(NetworkOptions("classifier", str(tmp_path)), None)  # type: ignore[arg-type]
