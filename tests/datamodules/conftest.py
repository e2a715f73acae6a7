"""What the tests of several data modules share: rows in one line, tokenizers of three families, a small root."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.sources import Corpus, load_corpus

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
    "</s>",
    "＜/s＞",
    "[ＳＥＰ]",
    "<unk>",
    "<0x0A>",
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


def says_something(text: str) -> bool:
    """Whether a text has more than blanks and invisible characters."""
    return any(not character.isspace() and unicodedata.category(character) != "Cf" for character in text)


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
def tokenizers(embedded: Corpus) -> "dict[str, PreTrainedTokenizerFast]":
    """One tokenizer of each family.

    Made from scratch; a chat model's; an encoder's, with words around a text; and those whose model has its control
    tokens among its words: Unigram (as T5 and XLM-R have), WordLevel, and WordPiece that splits at white space alone.
    """
    from datamodules.prompting.templates import DEFAULT_PROMPT, RewardTemplate, training_text
    from datamodules.prompting.tokenizers import train_tokenizer

    text = training_text(RewardTemplate.read(DEFAULT_PROMPT), embedded.train[:300])
    return {"scratch": train_tokenizer(text, 500), "chat": _chat_tokenizer(text), "encoder": _encoder_tokenizer()} | {
        "unigram": _unigram_tokenizer(),
        "words": _word_tokenizer(),
        "pieces": _encoder_tokenizer(white_space=True),
    }


def _chat_tokenizer(text: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Marks turns with a special token, and tool calls with an added token that is not called special."""
    from tokenizers import AddedToken

    from datamodules.prompting.tokenizers import train_tokenizer

    tokenizer = train_tokenizer(text, 300)
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True), AddedToken("<tool_call>", special=False)])
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}<|eot_id|>{% endfor %}"
    return tokenizer


def _unigram_tokenizer() -> "PreTrainedTokenizerFast":
    """In the manner of T5: white space belongs to words, letters become plain ones, bytes are a last resort."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    control = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = [(token, 0.0) for token in control] + [(chr(code), -5.0) for code in (0x2581, *range(33, 127))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _word_tokenizer() -> "PreTrainedTokenizerFast":
    """Whole words between white space, one of its special tokens a single character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", '"', "[SEP]", "x", "the", "a", "Judge", "this", "."]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "[SEP]", "mask_token": '"'}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _encoder_tokenizer(white_space: bool = False) -> "PreTrainedTokenizerFast":
    """In the manner of BERT: lower case, word pieces, [CLS] before a text and [SEP] after it.

    Args:
        white_space: Words end at white space alone, keep their case, and full-width letters become plain ones.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*special.values(), "[MASK]", *characters, *(f"##{character}" for character in characters)]
    tokenizer = Tokenizer(
        models.WordPiece({token: number for number, token in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.NFKC() if white_space else normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if white_space else pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special)
