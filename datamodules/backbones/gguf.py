"""GGUF files as backbones: converted once to safetensors, with tokenizer and configuration, into a cache."""

import fcntl
import importlib.metadata
import importlib.util
import json
import logging
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from datamodules.backbones.quiet import quiet_transformers
from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.files.reading import file_digest, require_regular
from datamodules.files.writing import Unfinished, checksum, disk_full, remove

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LIBRARIES = ("gguf", "accelerate")  # with which transformers reads GGUF files
NOTE = "conversion.json"  # in the folder of a conversion
WEIGHTS = "model.safetensors"
WEIGHTS_A_BYTE = 8  # at most: no quantization stores less than a bit per weight
# Names of llama.cpp for tokenizers that split text as GPT-2's, after each digit has become a word of its own.
# transformers splits as GPT-2's alone (integrations/gguf/gguf_tokenizer_mapping.py).
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
AS_GPT2 = {"", "default", "gpt-2", "mpt", "olmo", "jais", "phi-2"}
log = logging.getLogger("proactive")


class ConversionNote(BaseModel):
    """What a folder of the cache contains: the CRC-32 of each file, by its name."""

    checksums: dict[str, int]


def converted(file: Path, digest: str | None = None) -> Path:
    """The folder with the conversion of a GGUF file, as `save_pretrained` writes it. It is converted at the first call.

    The folder is in the cache of Hugging Face (HF_HOME). Its name contains the SHA-256 of the GGUF file and the version
    of transformers, which converts it. The weights are float32, so they are exactly those of the file.

    Args:
        file: The GGUF file.
        digest: Its SHA-256, if it is known.

    Raises:
        UserError: The file cannot be read as a GGUF file of a language model, or a library is missing.
    """
    require_regular(file, "model.backbone")
    found = file.stat()
    return _converted(file.resolve(), found.st_size, found.st_mtime_ns, digest)


@cache  # the digest and the checksums are computed once per process
def _converted(file: Path, size: int, modified: int, digest: str | None) -> Path:
    from huggingface_hub.constants import HF_HOME

    digest = digest or file_digest(file, "model.backbone")
    name = f"{digest[:32]}-transformers-{importlib.metadata.version('transformers')}"
    folder = Path(HF_HOME, "proactive", "backbones", name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{name}.lock").open("w") as lock:  # other ranks wait, and find the conversion
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_sound(folder):
            _require_libraries(file)
            log.info(f"model.backbone: converting {file} to safetensors, once, into {folder}")
            _write(file, folder)
    return folder


def _is_sound(folder: Path) -> bool:
    """Whether a folder contains a whole conversion."""
    try:
        note = ConversionNote.model_validate_json((folder / NOTE).read_bytes())
        if WEIGHTS not in note.checksums:  # an earlier version could leave them out
            return False
        return all(checksum(folder / name) == expected for name, expected in note.checksums.items())
    except (OSError, ValueError):
        return False


def _require_libraries(file: Path) -> None:
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"model.backbone: reading {file.name} needs {' and '.join(missing)}",
            'Install what reads GGUF files: pip install -e ".[gguf]"',
        )


def _write(file: Path, folder: Path) -> None:
    """Convert a GGUF file into a new folder. A damaged folder is replaced."""
    with Unfinished(folder, folder=True) as unfinished:
        try:
            with quiet_transformers():
                tokenizer, network = _read(file)
                _save(network, unfinished.path)
                tokenizer.save_pretrained(unfinished.path)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # a damaged or unknown file can cause any error in the libraries
            if disk_full(error):
                raise
            raise UserError(
                f"model.backbone: {file} cannot be read as a GGUF file: {error_text(error, 300)}",
                "Give a GGUF file of a language model of which transformers knows the architecture.",
            ) from error
        sums = {path.name: checksum(path) for path in unfinished.path.iterdir()}
        (unfinished.path / NOTE).write_text(ConversionNote(checksums=sums).model_dump_json())
        remove(folder)
        unfinished.path.replace(folder)


def _save(network: "PreTrainedModel", folder: Path) -> None:
    """Write what `save_pretrained` writes. That method writes nothing on ranks above 0, but any rank may convert."""
    from safetensors.torch import save_file

    network.config.architectures = [type(network).__name__]
    network.config.save_pretrained(folder)
    network.generation_config.save_pretrained(folder)
    tied = network.all_tied_weights_keys
    weights = {name: weight.contiguous() for name, weight in network.state_dict().items() if name not in tied}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _read(file: Path) -> tuple["PreTrainedTokenizerFast", "PreTrainedModel"]:
    """The tokenizer and the network of a GGUF file, with float32 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:  # nothing beside the file is read
        link = Path(folder, "model.gguf")
        link.symlink_to(file)
        place: dict[str, Any] = {"pretrained_model_name_or_path": folder, "gguf_file": link.name}
        config = AutoConfig.from_pretrained(**place)
        _refuse_other_size(file, config)
        tokenizer = _tokenizer(link, AutoTokenizer.from_pretrained(**place))
        read, found = AutoModelForCausalLM.from_pretrained(
            **place,
            dtype=torch.float32,
            attn_implementation="eager",
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model.backbone: {file} lacks {len(missing)} tensors, the first of them {missing[0]}",
            "Fetch the file again, or give another one.",
        )
    return tokenizer, _plain(read)


def _tokenizer(file: Path, read: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """The tokenizer of a file without the special tokens that transformers adds, for which there are no embeddings."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(read.backend_tokenizer.to_str())
    size = len(content["model"]["vocab"])
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
    own = Tokenizer.from_str(json.dumps(content))
    own.pre_tokenizer = _pre_tokenizer(file, own)
    special = {name: token for name, token in read.special_tokens_map.items() if isinstance(token, str)}
    known = {name: token for name, token in special.items() if own.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=own, chat_template=read.chat_template, **known)


def _plain(read: "PreTrainedModel") -> "PreTrainedModel":
    """The same network without the traces of its quantization, with which it could not be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    config = type(read.config).from_dict(settings)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.load_state_dict(read.state_dict(), assign=True)
    network.tie_weights()
    network.generation_config = read.generation_config
    return network


def _refuse_other_size(file: Path, config: Any) -> None:
    """Refuse a configuration of a far larger network than the file can hold, before memory is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        needed = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if needed > WEIGHTS_A_BYTE * file.stat().st_size:
        raise UserError(
            f"model.backbone: {file} describes {needed:,} weights, more than {file.stat().st_size:,} bytes can hold",
            "Fetch the file again, or give another one.",
        )


def _pre_tokenizer(file: Path, tokenizer: "Tokenizer") -> Any:
    """How text is split into words before the merges, as the file's `tokenizer.ggml.pre` names it."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    name = str(field.contents()) if field is not None else ""
    own = tokenizer.pre_tokenizer
    if name in SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])
    if isinstance(own, pre_tokenizers.ByteLevel) and name not in AS_GPT2:
        log.warning(
            f"model.backbone: its tokenizer splits text as {name!r}, which transformers does not know; it is split as "
            "GPT-2 does, so rows may have other tokens than in pretraining"
        )
    return own
