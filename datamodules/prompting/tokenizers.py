"""Tokenizers: trained on the text of a run, loaded by name, or stored in a checkpoint as text."""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from datamodules.backbones.packaged import backbone_source, check_source
from datamodules.errors import UserError
from datamodules.escaping import error_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Training time is quadratic in the length of a word.
_LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")
SCRATCH = "scratch"  # as name of a backbone: train the tokenizer, initialize the weights


def make_tokenizer(
    name: str, texts: Callable[[], Iterable[str]], vocabulary_size: int, trust_remote_code: bool = False
) -> "PreTrainedTokenizerFast":
    """Load a tokenizer, or train one if its name is `SCRATCH`.

    Args:
        name: Hub id, local path, or `SCRATCH`.
        texts: Returns the texts to train on.
        vocabulary_size: Maximum number of tokens of a trained tokenizer.
        trust_remote_code: Whether a loaded tokenizer may run its own code.

    Raises:
        UserError: See `train_tokenizer` and `load_tokenizer`.
    """
    if name == SCRATCH:
        return train_tokenizer(texts(), vocabulary_size)
    return load_tokenizer(name, trust_remote_code)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer, which can encode every text.

    Args:
        texts: Training texts.
        vocabulary_size: Maximum number of tokens, at least 259: all bytes and three special tokens.

    Raises:
        UserError: `vocabulary_size` is too small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    if vocabulary_size < len(alphabet) + len(special):
        raise UserError(
            f"data.vocabulary_size: {vocabulary_size} is too small",
            f"Use at least {len(alphabet) + len(special)}.",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(special.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _LONG_RUN.split(text)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a backbone, with a padding token and padding on the right.

    Args:
        name: See `datamodules.backbones.packaged.backbone_source`.
        trust_remote_code: Whether a tokenizer from the hub may run its own code.

    Raises:
        UserError: There is none, or it is not a fast tokenizer.
    """
    from transformers import AutoTokenizer

    source = backbone_source(name)
    try:
        check_source(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"cannot load the tokenizer of {name}: {error_text(error, 200)}",
            "Give a folder that save_pretrained wrote, or a hub id that this machine can reach.",
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {name} is not a fast one", "Use a backbone that has a tokenizer.json.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name} has neither a padding nor an end token", "Set its pad_token.")
    tokenizer.padding_side = "right"
    if isinstance(tokenizer.chat_template, dict):  # several, of which others are for tools or documents
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    return tokenizer


def tokenizer_state(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """Return everything needed to rebuild a tokenizer, in plain types for a checkpoint."""
    return {
        "json": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        "chat_template": tokenizer.chat_template,
    }


def tokenizer_from_state(state: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """Rebuild a tokenizer from its `tokenizer_state`.

    Raises:
        UserError: The state is damaged, or names a special token that the tokenizer does not have.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        kept = Tokenizer.from_str(state["json"])
        if unknown := [token for token in state["special"].values() if token and kept.token_to_id(token) is None]:
            raise ValueError(f"there is no token {unknown[0]}")
        return PreTrainedTokenizerFast(
            tokenizer_object=kept,
            padding_side="right",
            chat_template=state.get("chat_template"),  # older checkpoints have none
            **state["special"],
        )
    except Exception as error:  # a damaged state can cause any error in the library
        reason = error_text(error, 200)
        raise UserError(f"tokenizer: cannot be read: {reason}", "Give a checkpoint that is undamaged.") from error
