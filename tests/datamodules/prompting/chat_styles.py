"""Chat templates in the manner of well-known instruct models, and small tokenizers of several kinds that have them."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # writes an empty thought before the last answer
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (  # trims, and writes the date
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') if strftime_now is defined else '' }}\n\n{{ said }}<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (  # has no system role, and calls the assistant model
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # has no system role, and its marks are no special tokens
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (  # writes the system message into the last user message, and special tokens right beside the texts
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST]{% if said is defined %}{{ said + '\n\n' }}{% endif %}"
    "{{ message['content'] }}[/INST]{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (  # its special tokens take the white space behind them
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
STYLES = {
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "Qwen 3": (QWEN3, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "Llama 3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "Gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "Mistral": (MISTRAL, []),
    "Mistral 3": (MISTRAL3, ["[INST]", "[/INST]"]),
    "Phi 3": (PHI3, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
}
KINDS = ("GPT-2", "Llama 3", "Gemma", "marked once", "marked always")
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def chat_tokenizer(style: str, kind: str, texts: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Return a tokenizer that is trained on some texts and has the chat template of a style.

    Args:
        style: One of `STYLES`.
        kind: How texts are divided: as GPT-2 or as Llama 3 does; or white space is part of the words behind it, as in
            Gemma, where line breaks are tokens of their own. "marked": the beginning of a text has a mark, either only
            that of the whole text, or also that behind each special token. "whole": words are not divided, also not at
            line breaks.
        texts: The texts.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template, added = STYLES[style]
    control = list(special.values())
    if kind in ("GPT-2", "Llama 3", "whole"):
        tokenizer = Tokenizer(models.BPE())
        by_words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")
        tokenizer.pre_tokenizer = (
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "GPT-2")
            if kind != "Llama 3"
            else pre_tokenizers.Sequence([by_words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if kind == "marked once":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        else:
            mark = [normalizers.Prepend("▁")] if kind == "marked always" else []
            tokenizer.normalizer = normalizers.Sequence([*mark, normalizers.Replace(" ", "▁")])
            tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while it is trained
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        control += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=control, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    # Without line breaks, as in the vocabularies of Llama 2 and Mistral.
    lines = [line for text in texts for line in ([text] if alphabet else text.split("\n"))]
    tokenizer.train_from_iterator(lines, trainer)
    plain = json.loads(tokenizer.to_str())  # bytes are words of the vocabulary, not added tokens
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    plain["pre_tokenizer"] = plain["pre_tokenizer"] if kind not in ("Gemma", "marked always") else None
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    takes_space = style == "Phi 3"
    added = [*added, "\n", "\n\n"] if kind == "Gemma" else added
    found.add_tokens(
        [AddedToken(token, special=not token.isspace(), rstrip=takes_space, normalized=False) for token in added]
    )
    found.chat_template = template
    return found
