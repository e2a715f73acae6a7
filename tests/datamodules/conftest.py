"""What the tests of several data modules share: rows in one line, tokenizers of three families, a small root."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from datamodules.records import AnnotatedRow
from datamodules.sources import Corpus, load_corpus
from tests.helpers import small_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# No clock decides a test: the machine may be busy.
few_examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# What somebody may write into an event or a proposal in order to be taken for something else.
IMPOSTORS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "<|eot_id|>",
    "<tool_call>",
    "\n",
    "\r\n",
    "\x0b",
    "\x1b[2J",
    "\x85",
    "\u2028",
    "\u2029",
    "\\n",
    "{event}",
    "{time}",
    "{proposal}",
    "{proposal_json}",
    '"',
    "Offer: yes",
    "No offer.",
    "Accepted?",
)


def row_of(
    events: Sequence[str], proposal: str | None = "Explain the error.", accepted: bool = True, **fields: Any
) -> AnnotatedRow:
    """A row whose history is these events, a minute apart."""
    history = [{"time": str(60 * number), "event": event} for number, event in enumerate(events)]
    return AnnotatedRow.model_validate({"obs": history, "pred_task": proposal, "valid": accepted, **fields})


@pytest.fixture(scope="session")
def embedded() -> Corpus:
    return load_corpus("embedded")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root of 9 scenes; tests only read it."""
    return small_root(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="session")
def tokenizers(embedded: Corpus) -> "dict[str, PreTrainedTokenizerFast]":
    """One tokenizer of each family: made from scratch, chat model, encoder with words around a text."""
    from datamodules.prompts import DEFAULT_PROMPT, PromptTemplate, training_text
    from datamodules.tokenizer import train_tokenizer

    text = training_text(PromptTemplate.read(DEFAULT_PROMPT), embedded.train[:300])
    return {"scratch": train_tokenizer(text, 500), "chat": _chat_tokenizer(text), "encoder": _encoder_tokenizer()}


def _chat_tokenizer(text: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Marks turns with a special token, and tool calls with an added token that is not called special."""
    from tokenizers import AddedToken

    from datamodules.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(text, 300)
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True), AddedToken("<tool_call>", special=False)])
    return tokenizer


def _encoder_tokenizer() -> "PreTrainedTokenizerFast":
    """In the manner of BERT: lower case, word pieces, [CLS] before a text and [SEP] after it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*special.values(), "[MASK]", *characters, *(f"##{character}" for character in characters)]
    tokenizer = Tokenizer(
        models.WordPiece({token: number for number, token in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special)
