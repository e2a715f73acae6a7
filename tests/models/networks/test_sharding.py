"""Sharded networks: the same weights as on one device, in a part of its memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from datamodules.errors import UserError
from models.networks.configurations import meta_network
from models.networks.distributed_loading import build_sharded_network
from models.networks.network_options import NetworkOptions
from models.networks.sharding import blocks
from tests.models.sharded_builds import built, peak_memory
from tests.models.small import FAMILIES, SMALL_LLAMA
from tests.ranks import on_ranks


def saved(folder: Path, kind: type = AutoModelForCausalLM, family: str = "llama", **options: object) -> Path:
    """A small backbone, saved as its authors would publish it."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, vocab_size=280, **{**FAMILIES[family], **options})
    kind.from_config(config).save_pretrained(folder, max_shard_size="20KB")  # several files and an index
    return folder


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> str:
    """Replace a tensor in a folder's files, or remove it; return its name in the files."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            del tensors[name]
            if tensor is not None:
                tensors[name] = tensor
            save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if tensor is None:
        del content["weight_map"][name]
    index.write_text(json.dumps(content))
    return name


def test_sharded_weights_equal_those_of_one_device(tmp_path: Path) -> None:
    """With a new head, tied embeddings, names without the base model's prefix, and buffers."""
    cases = [
        ("classifier", saved(tmp_path / "language model")),
        ("language model", saved(tmp_path / "again")),
        ("language model", saved(tmp_path / "tied", family="qwen2", tie_word_embeddings=True)),
        ("classifier", saved(tmp_path / "base", AutoModel)),
        ("classifier", saved(tmp_path / "encoder", AutoModel, family="distilbert")),  # a head of two layers
        ("language model", saved(tmp_path / "gpt2", family="gpt2")),
    ]
    for case, result in zip(cases, on_ranks(2, built, [(h, str(f)) for h, f in cases], folder=tmp_path), strict=True):
        assert isinstance(result, dict), result
        assert result["found"].keys() == result["expected"].keys(), case
        for name, weight in result["expected"].items():
            assert torch.equal(result["found"][name], weight), f"{case}: {name}"


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    missing, misshapen = saved(tmp_path / "missing"), saved(tmp_path / "misshapen")
    first = change(missing, "model.layers.1.mlp.up_proj.weight", None)
    second = change(misshapen, "model.norm.weight", torch.ones(3))
    cases = [("classifier", str(missing)), ("language model", str(misshapen)), ("classifier", str(tmp_path))]
    results = on_ranks(2, built, cases, folder=tmp_path)
    assert [len(result) for result in results] == [2, 2, 2], results
    assert first in results[0][0]
    assert second in results[1][0]
    assert "(3,)" in results[1][0]
    assert all(hint for _, hint in results)


def test_no_rank_ever_has_all_weights(tmp_path: Path) -> None:
    """Each of 4 ranks needs less than half of the model's bytes plus 1 GB, which is less than the whole model."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=280,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    network = meta_network(NetworkOptions("language model"), config)
    config.save_pretrained(tmp_path)
    weights = {name: torch.empty(p.shape).fill_(number) for number, (name, p) in enumerate(network.named_parameters())}
    size = sum(weight.numel() * 4 for weight in weights.values())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del weights
    result = on_ranks(4, peak_memory, str(tmp_path), folder=tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert result["wrong"] == 0
    assert result["peak"] < size * 2 / 4 + 1e9
    assert size > size * 2 / 4 + 0.6e9  # a rank that held all would be beyond it


def test_a_precision_without_float32_masters_is_refused() -> None:
    nothing: Any = None
    with pytest.raises(UserError, match=r"trainer\.precision"):
        build_sharded_network(
            NetworkOptions("classifier"), nothing, mesh=nothing, device=torch.device("cpu"), precision="16-mixed"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_in_every_family(family: str) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    network: PreTrainedModel = meta_network(NetworkOptions("classifier", family), config)
    found = blocks(network)
    assert len(found) == 2
    assert all(isinstance(block, nn.Module) for block in found)
    assert len({type(block) for block in found}) == 1
    assert SMALL_LLAMA["num_hidden_layers"] == 2
