"""GGUF files as backbones: the conversion computes the same, is made once, and is whole or absent."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from datamodules.backbones import gguf
from datamodules.backbones.gguf import converted
from datamodules.backbones.packaged import backbone_source
from datamodules.corpus.sources import Corpus
from datamodules.errors import UserError
from tests.gguf_files import CHAT_TEMPLATE, small_llama, with_cache, write_gguf
from tests.ranks import on_ranks

TEXTS = ["The user  opens parser.py at 12:30", "  2026, Day 1\n\tan é and 中", "<bos>user: Hi<eos>"]


@pytest.fixture(scope="session")
def original(embedded: Corpus) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return small_llama(embedded.train[:100])


@pytest.fixture(scope="session")
def file(original: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", *original)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "huggingface"))
    gguf._converted.cache_clear()
    return tmp_path / "huggingface" / "proactive" / "backbones"


def test_the_converted_network_computes_the_same_logits(
    original: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], file: Path
) -> None:
    folder = backbone_source(str(file))
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids_BT = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(ids_BT).logits, original[0](ids_BT).logits)
    assert network.dtype == torch.float32
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert not hasattr(network.config, "quantization_config")


def test_the_converted_tokenizer_gives_the_same_tokens_and_splits_digits(
    original: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], file: Path
) -> None:
    from tokenizers import pre_tokenizers

    tokenizer, own = AutoTokenizer.from_pretrained(converted(file)), original[1]
    splits = [pre_tokenizers.Digits(individual_digits=True), own.backend_tokenizer.pre_tokenizer]
    expected = PreTrainedTokenizerFast(tokenizer_object=type(own.backend_tokenizer).from_str(own._tokenizer.to_str()))
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == expected(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer) == len(own)
    assert tokenizer.special_tokens_map == own.special_tokens_map
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_file_is_converted_once_and_again_if_the_cache_is_damaged(
    file: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "proactive")

    def conversions() -> int:
        gguf._converted.cache_clear()  # as in another process
        caplog.clear()
        assert converted(file).parent == cache
        return caplog.text.count("converting")

    assert [conversions(), conversions()] == [1, 0]
    weights = converted(file) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert [conversions(), conversions()] == [1, 0]
    note = converted(file) / gguf.NOTE  # as an earlier version could leave it
    listed = json.loads(note.read_text())["checksums"]
    weights.unlink()
    note.write_text(json.dumps({"checksums": {name: sum for name, sum in listed.items() if name != weights.name}}))
    assert [conversions(), conversions()] == [1, 0]
    assert weights.exists()
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == [weights.parent.name]


def test_any_rank_can_convert(file: Path, cache: Path, tmp_path: Path) -> None:
    """transformers' own `save_pretrained` writes no network on ranks above 0."""
    on_ranks(2, with_cache, tmp_path / "ranks", converted_on_rank_1, file, folder=tmp_path)
    [folder] = (path for path in (tmp_path / "ranks").rglob("*-transformers-*") if path.is_dir())
    expected = {path.name: path.read_bytes() for path in converted(file).iterdir()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected


def converted_on_rank_1(file: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    if rank == 1:
        converted(file)
    dist.barrier()


def test_another_file_under_the_same_path_gets_another_folder(
    original: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], file: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(file, tmp_path / "copy.gguf"))
    first = converted(path)
    assert first == converted(file)
    assert write_gguf(path, *original, splitting="gpt-2") == path
    assert converted(path) != first


def test_a_tokenizer_of_an_unknown_kind_is_announced(
    original: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    converted(write_gguf(tmp_path / "known.gguf", *original, splitting="gpt-2"))
    assert "splits text as" not in caplog.text
    converted(write_gguf(tmp_path / "unknown.gguf", *original, splitting="poro-chat"))
    assert "splits text as 'poro-chat', which transformers does not know" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "text", "larger", "missing", "folder"])
def test_a_file_that_cannot_be_read_is_named_and_leaves_no_folder(
    damage: str, original: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], file: Path, tmp_path: Path, cache: Path
) -> None:
    path, words = tmp_path / "bad.gguf", f"{tmp_path / 'bad.gguf'} cannot be read as a GGUF file"
    if damage == "cut":
        path.write_bytes(file.read_bytes()[:-20000])
    elif damage == "text":
        path.write_text("weights")
    elif damage == "larger":
        write_gguf(path, *original, block_count=200)
        words = r"describes 1,\d{3},\d{3} weights, more than [\d,]+ bytes can hold"
    else:
        words = "No such file" if damage == "missing" else "is a folder"
        if damage == "folder":
            path.mkdir()
    with pytest.raises(UserError, match=words):
        backbone_source(str(path))
    assert not cache.exists() or not [found for found in cache.iterdir() if not found.name.endswith(".lock")]


def test_a_file_without_a_layer_is_refused(
    original: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"lacks 9 tensors, the first of them model\.layers\.2\."):
        converted(write_gguf(tmp_path / "gap.gguf", *original, block_count=3))


def test_missing_libraries_are_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "LIBRARIES", ("gguf_of_nobody", "accelerate"))
    with pytest.raises(UserError, match=r"reading small\.gguf needs gguf_of_nobody\n") as error:
        converted(file)
    assert '".[gguf]"' in error.value.hint
