"""Small GGUF files, written with llama.cpp's library as its converter writes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, TokenType
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from datamodules.corpus.records import AnnotatedRow
from datamodules.prompting.templates import DEFAULT_PROMPT, RewardTemplate, training_text
from datamodules.prompting.tokenizers import train_tokenizer

CHAT_TEMPLATE = "{% for message in messages %}<bos>{{ message['role'] }}: {{ message['content'] }}<eos>{% endfor %}"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
NAMES = {  # of the parts of a block: transformers' name, GGUF's name
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def small_llama(rows: list[AnnotatedRow]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama with tied embeddings and grouped heads, and a tokenizer trained on rows."""
    tokenizer = train_tokenizer(training_text(RewardTemplate.read(DEFAULT_PROMPT), rows), 400)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **ids)).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.3)  # as initialized, the layers would hardly change what follows
    return network, tokenizer


def write_gguf(
    path: Path, network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, splitting: str = "smollm", **more: Any
) -> Path:
    """Write a network and its tokenizer as llama.cpp's converter does.

    Args:
        path: The file.
        network: A Llama.
        tokenizer: A byte-level BPE tokenizer.
        splitting: How the tokenizer splits text into words, by llama.cpp's name.
        more: `block_count`, to write another number of layers than the network has.
    """
    config = network.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(more.get("block_count", config.num_hidden_layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, splitting)
    for name, weight in network.state_dict().items():
        if name != "lm_head.weight":  # tied to the embeddings
            writer.add_tensor(_name(name), _as_written(name, weight, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_cache(folder: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of `tests.ranks.on_ranks`, with the cache of Hugging Face in a folder."""
    from huggingface_hub import constants

    constants.HF_HOME = str(folder)
    return function(*arguments)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, splitting: str) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [tokenizer.convert_ids_to_tokens(number) for number in range(len(tokenizer))]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, index, part = name.removesuffix(".weight").split(".", 3)
        return f"blk.{index}.{NAMES[part]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def _as_written(name: str, weight: Tensor, config: LlamaConfig) -> Tensor:
    """The weight in GGUF's order: of queries and keys, the two halves of each head's rows alternate."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight.clone()
    rows, columns = weight.shape
    return weight.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns).clone()
