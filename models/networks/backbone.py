"""Networks over any Hugging Face backbone: pretrained, from a configuration, or from scratch.

Shape legend: R rows, T tokens, D hidden size, C classes (rejected, accepted), L tokens to predict, V vocabulary.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datamodules.batching.layouts import Inputs
from datamodules.corpus.records import read_json
from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.files.reading import require_regular_files
from datamodules.prompting.tokenizers import SCRATCH
from models.networks.forward import as_forward
from models.networks.tree_reading import read_tree, tree_states
from models.networks.trials import NO_DIFFERENCE, tolerance
from models.networks.weight_files import (
    Configuration,
    naming,
    refuse_names,
    refuse_not_finite,
    refuse_other_shape,
    safetensors_files,
    weights_in,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Head = Literal["classifier", "language model"]
Pooling = Literal["auto", "last", "cls", "mean"]
DtypeName = Literal["float32", "bfloat16", "float16"]
POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}  # their first one is the padding id + 1
STRETCHED = {"yarn", "linear", "dynamic"}  # rotary positions, see `position_room`
LABELS = {0: "rejected", 1: "accepted"}
# How the files of a network for text and pictures name the part that reads text, and what that is called alone.
TEXT_PART = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "{}.",
}
LOGITS_AT_ONCE = 2**25  # of a chunk: 128 MiB in float32, and as much again for their gradients
# A Llama-type decoder of about 2.2 million parameters, embeddings included.
SCRATCH_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
log = logging.getLogger("proactive")


def build_network(
    head: Head,
    backbone: str,
    tokenizer: "PreTrainedTokenizerFast",
    scratch: dict[str, Any] | None = None,
    *,
    dtype: DtypeName = "float32",
    attn_implementation: str | None = None,
    dropout: float | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """A Hugging Face sequence classifier with two classes, or causal language model, fit for `tokenizer`.

    Args:
        head: What the backbone is to end in.
        backbone: Hub id or local path, or "scratch" for random weights.
        tokenizer: Settles the vocabulary of a backbone from scratch and the padding token of any.
        scratch: For "scratch": a transformers configuration as a mapping, `model_type` included.
        dtype: How the weights are stored.
        attn_implementation: Any that transformers names; its own choice if None.
        dropout: Set for every kind of dropout the configuration has; as configured if None.
        trust_remote_code: Whether a backbone may run code of its own.

    Raises:
        UserError: There is no such backbone, it has no such head, or the tokenizer does not fit it.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    config = network_config(head, backbone, tokenizer, scratch, dropout=dropout, trust_remote_code=trust_remote_code)
    if backbone == SCRATCH:
        with _clear_errors(head, backbone), quiet():
            return _auto_class(head).from_config(config, **options)
    return pretrained_network(head, backbone, config, trust_remote_code=trust_remote_code, **options)[0]


def pretrained_network(
    head: Head, backbone: str, config: "PretrainedConfig", **options: Any
) -> tuple["PreTrainedModel", list[str]]:
    """A network with the backbone's own weights, and which of its tensors were drawn.

    Drawn are those that the files lack, and a classifier's head of another number of classes.

    Raises:
        UserError: The files do not belong to the configuration, or lack a part of the layers.
    """
    from transformers import PretrainedConfig
    from transformers.utils import SAFE_WEIGHTS_NAME

    with _clear_errors(head, backbone), quiet():
        auto = _auto_class(head)
        if Path(backbone).is_dir():
            safetensors_files(Path(backbone), SAFE_WEIGHTS_NAME)
        is_part = PretrainedConfig.get_config_dict(backbone)[0].get("model_type") != config.model_type
        prefix = auto._model_mapping[type(config)].base_model_prefix if is_part else ""
        network, found = auto.from_pretrained(
            backbone,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are looked at below
            key_mapping={pattern: target.format(prefix) for pattern, target in TEXT_PART.items()} if is_part else None,
            output_loading_info=True,
            **options,
        )
        if is_part:
            vars(network).pop("_weight_conversions", None)  # by which it would be saved under the names of the whole
        drawn = sorted(found["missing_keys"])
        if gaps := [name for name in drawn if _must_be_there(network, head, name)]:
            raise UserError(
                f"model.backbone: {backbone} lacks {len(gaps)} of its tensors, the first of them {gaps[0]}",
                "Fetch the backbone's files again, or give one whose files transformers can read.",
            )
        if more := [name for name in sorted(found["unexpected_keys"]) if _is_of_a_layer(network, name)]:
            raise UserError(
                f"model.backbone: {backbone} holds {len(more)} tensors of layers that its config.json does not have, "
                f"the first of them {more[0]}",
                "Give weights and config.json that belong together.",
            )
        for name, there, needed in sorted(found["mismatched_keys"]):
            refuse_shape(network, head, backbone, name, there, needed)
            drawn.append(name)
        with naming(f"model.backbone: {backbone}"):
            refuse_not_finite((n, weight) for n, weight in network.state_dict().items() if n not in drawn)
    return network, sorted(drawn)


def _must_be_there(network: "PreTrainedModel", head: Head, name: str) -> bool:
    """Whether a tensor can't be drawn anew without harm: all but a classifier's head and what pools for it."""
    layers = [module for module in network.base_model.modules() if isinstance(module, nn.ModuleList)]
    vital = [*layers, network.get_input_embeddings()]
    owner = network.get_submodule(name.rpartition(".")[0])
    return head == "language model" or any(owner is module for part in vital for module in part.modules())


def _is_of_a_layer(network: "PreTrainedModel", name: str) -> bool:
    """Whether a tensor's name is that of one more layer than the network has."""
    for prefix, module in network.named_modules():
        for layers in (prefix, prefix.removeprefix(f"{network.base_model_prefix}.")):
            if isinstance(module, nn.ModuleList) and name.startswith(f"{layers}."):
                number = name.removeprefix(f"{layers}.").partition(".")[0]
                if number.isdecimal() and int(number) >= len(module):
                    return True
    return False


def refuse_shape(
    network: "PreTrainedModel", head: Head, backbone: str, name: str, there: Sequence[int], needed: Sequence[int]
) -> None:
    """Say that a tensor of the files has another shape than the network's; a classifier's head is then a new one.

    Raises:
        UserError: The tensor is no part of such a head.
    """
    inside = {id(module) for module in network.base_model.modules()}
    if head == "language model" or id(network.get_submodule(name.rpartition(".")[0])) in inside:
        raise UserError(
            f"model.backbone: {backbone}: {name} has the shape {tuple(there)}, not {tuple(needed)}",
            "Give weights and config.json that belong together.",
        )
    log.info(
        f"model.backbone: {name} of {backbone} has the shape {tuple(there)}, not {tuple(needed)}: "
        f"the head is a new one, of {len(LABELS)} classes"
    )


def network_config(
    head: Head,
    backbone: str,
    tokenizer: "PreTrainedTokenizerFast",
    scratch: dict[str, Any] | None = None,
    *,
    dropout: float | None = None,
    trust_remote_code: bool = False,
) -> "PretrainedConfig":
    """The configuration of the network that `build_network` makes, with its options and errors."""
    from transformers import AutoConfig

    with _clear_errors(head, backbone), quiet():
        if backbone == SCRATCH:
            settings = {"vocab_size": len(tokenizer), **(scratch or SCRATCH_CONFIG)}
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        else:
            if Path(backbone).is_dir():
                require_regular_files(Path(backbone), "model.backbone")
            config = AutoConfig.from_pretrained(backbone, trust_remote_code=trust_remote_code)
        text = config.get_text_config()
        if not hasattr(text, "vocab_size"):
            raise UserError(f"model.backbone: {backbone} reads no text", "Give an encoder or decoder of text.")
        if type(text) in _auto_class(head)._model_mapping:
            config = text  # of a network for text and pictures, the part that reads text
        _prepare(config, head, tokenizer, dropout)
        if len(tokenizer) > text.vocab_size:
            raise UserError(
                f"model.backbone: the tokenizer has {len(tokenizer)} tokens, {backbone} has embeddings for "
                f"{text.vocab_size}",
                "Give backbone and tokenizer that belong together.",
            )
    return config


def weightless_network(
    head: Head,
    backbone: str,
    config: "PretrainedConfig",
    *,
    dtype: DtypeName,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> "PreTrainedModel":
    """The network of a configuration on the meta device."""
    options = {"trust_remote_code": trust_remote_code} if trust_remote_code else {}
    with _clear_errors(head, backbone), quiet(), torch.device("meta"):
        return _auto_class(head).from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attn_implementation, **options
        )


def network_from_config(
    head: Head, config: dict[str, Any], dtype: DtypeName, attn_implementation: str | None
) -> "PreTrainedModel":
    """The network that a checkpoint's configuration describes, with random weights to load the real ones into."""
    from transformers import AutoConfig

    with _clear_errors(head, config["model_type"]), quiet():
        return _auto_class(head).from_config(
            AutoConfig.for_model(**config), dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        )


def refuse_other_size(head: Head, config: dict[str, Any], tensors: int, weights: int, adapter: bool = False) -> None:
    """Refuse a configuration of a far greater network than there are weights, before it takes time and memory.

    Args:
        head: What the network ends in.
        config: As a file describes it.
        tensors: How many there are in the file.
        weights: How many there are in all of them.
        adapter: Whether they are those of adapters alone, of which each layer has some.

    Raises:
        UserError: It is of a greater network, or of none.
    """
    from transformers import AutoConfig

    with _clear_errors(head, config["model_type"]), quiet():
        described = AutoConfig.for_model(**config)
        layers = int(getattr(described.get_text_config(), "num_hidden_layers", 0))
    what = f"{layers:,} layers" if layers > tensors else ""
    if not what and not adapter:
        network = weightless_network(
            head, config["model_type"], described, dtype="float32", attn_implementation=None, trust_remote_code=False
        )
        greater = sum(parameter.numel() for parameter in network.parameters())
        what = f"{greater:,} weights" if greater > 2 * weights else ""
    if what:
        raise UserError(
            f"its configuration describes {what}, but it holds {tensors:,} tensors of {weights:,} weights",
            "Give weights and configuration that belong together.",
        )


def refuse_unfit_tokenizer(network: "PreTrainedModel | None", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse a tokenizer with more tokens than a network has embeddings.

    Raises:
        UserError: It has.
    """
    assert network is not None, "a loaded model has weights"
    room = network.config.get_text_config().vocab_size
    if len(tokenizer) > room:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the network has embeddings for {room}",
            "Give backbone and tokenizer that belong together.",
        )


def base_from_config(
    head: Head, backbone: str, config: dict[str, Any], dtype: DtypeName, attn_implementation: str | None
) -> "PreTrainedModel":
    """The base of an adapter, from where it is named, with a new head as a checkpoint's configuration describes it.

    Raises:
        UserError: There is no such base any more.
    """
    from transformers import AutoConfig

    if backbone == SCRATCH:
        with same_random_numbers():
            return network_from_config(head, config, dtype, attn_implementation)
    try:
        return pretrained_network(
            head,
            backbone,
            AutoConfig.for_model(**config),
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
        )[0]
    except UserError as error:
        raise UserError(
            f"the weights are those of an adapter alone, and its base is missing: {error.what}",
            f"Put {backbone} back where it was, or use an export with model.adapter.merge true.",
        ) from error


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Always the same ones, the CPU's: a base from scratch is not kept with its adapter, but made anew anywhere."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def load_network(head: Head, path: str, *, attn_implementation: str | None = None) -> "PreTrainedModel":
    """A network as `save_pretrained` wrote it.

    Raises:
        UserError: The folder's weights are not those of its config.json, each of them.
    """
    from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_NAME

    folder = Path(path)
    _, config = read_json(folder / CONFIG_NAME, Configuration)
    with naming(folder):
        refuse_other_size(head, config, *weights_in(safetensors_files(folder, SAFE_WEIGHTS_NAME)))
        if (folder / ADAPTER_CONFIG_NAME).exists():  # transformers would load the backbone that it names
            raise UserError(f"{ADAPTER_CONFIG_NAME} lies in an export of a whole model", "Take it out.")
    with _clear_errors(head, str(folder)), quiet():
        network, found = _auto_class(head).from_pretrained(
            str(folder),
            use_safetensors=True,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    with naming(folder):
        refuse_names(found["missing_keys"], found["unexpected_keys"])
        for name, there, needed in sorted(found["mismatched_keys"]):
            refuse_other_shape(name, there, needed)
        refuse_not_finite(network.state_dict().items())
    return network


def _auto_class(head: Head) -> Any:
    import transformers

    classes = {"classifier": "AutoModelForSequenceClassification", "language model": "AutoModelForCausalLM"}
    return getattr(transformers, classes[head])


@as_forward
def classify(model: "PreTrainedModel", inputs: Inputs, pooling: Pooling) -> Tensor:
    """Logits of the two classes.

    Args:
        model: A sequence classifier of transformers.
        inputs: Padded rows or a tree.
        pooling: "auto" is the backbone's own: the last real token for a decoder, what its architecture
            defines (as a rule CLS) for an encoder. The others read the final hidden states and go through
            the last linear layer alone. A tree is read at the last token of each row, whatever this says.

    Returns:
        (R, C) floating logits.
    """
    if "subtree_end" in inputs:
        return classify_states(model, read_tree(model, inputs))
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    if pooling == "auto" and not reads_last_token(model):
        return model(input_ids=input_ids, attention_mask=attention_mask).logits
    options = {"use_cache": False} if reads_last_token(model) else {}  # encoders know of none
    hidden_RTD = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
    if pooling == "mean":
        weight_RT1 = attention_mask.unsqueeze(-1).to(hidden_RTD.dtype)
        pooled_RD = (hidden_RTD * weight_RT1).sum(1) / weight_RT1.sum(1)
    elif pooling == "cls":
        pooled_RD = hidden_RTD[:, 0]
    else:
        pooled_RD = _at_last_token(hidden_RTD, attention_mask)
    return classify_states(model, pooled_RD)


@as_forward
def last_states(model: "PreTrainedModel", inputs: Inputs) -> Tensor:
    """The final states (R, D) of padded rows at their last tokens."""
    output = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    return _at_last_token(output.last_hidden_state, inputs["attention_mask"])


def _at_last_token(hidden_RTD: Tensor, attention_mask: Tensor) -> Tensor:
    rows_R = torch.arange(len(hidden_RTD), device=hidden_RTD.device)
    return hidden_RTD[rows_R, attention_mask.sum(1) - 1]


def classify_states(model: "PreTrainedModel", pooled_RD: Tensor) -> Tensor:
    """Logits (R, C) of the classes, from what was pooled of each row."""
    layer = read_out(model)  # that of a backbone with adapters is float32 whatever the backbone is
    return layer(pooled_RD if pooled_RD.dtype == torch.float32 else pooled_RD.to(layer.weight.dtype))


@as_forward
def token_losses(model: "PreTrainedModel", inputs: Inputs, predicted_at: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of tokens to predict, in chunks whose logits are made anew for the gradient.

    So no more than `LOGITS_AT_ONCE` logits exist at once. PyTorch's own chunked loss, `linear_cross_entropy`, gives
    sums alone, where rows have weights, and no capped logits.

    Args:
        model: A causal language model of transformers.
        inputs: Padded rows or a tree.
        predicted_at: (L,) int64, which of all states predicts each token.
        target: (L,) int64.

    Returns:
        (L,) float32.
    """
    if "subtree_end" in inputs:
        hidden_BTD = tree_states(model, inputs, predicted_at)
    else:
        hidden_BTD = model.base_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
    hidden_LD = hidden_BTD.flatten(0, 1)[predicted_at]
    chunk = max(LOGITS_AT_ONCE // model.config.get_text_config().vocab_size, 1)

    def losses(part_LD: Tensor, part_target_L: Tensor) -> Tensor:
        return nn.functional.cross_entropy(language_logits(model, part_LD), part_target_L, reduction="none")

    parts = zip(hidden_LD.split(chunk), target.split(chunk), strict=True)
    if len(target) <= chunk:
        return torch.cat([losses(*part) for part in parts])
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


def language_logits(model: "PreTrainedModel", hidden_LD: Tensor) -> Tensor:
    """The logits (L, V) float32 that a language model predicts from its final states."""
    logits_LV = model.get_output_embeddings()(hidden_LD)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2's
    return (logits_LV if cap is None else torch.tanh(logits_LV / cap) * cap).float()


@as_forward
def language_problem(model: "PreTrainedModel") -> str | None:
    """What keeps a network from being trained as a causal language model here, tried on a short row; None if nothing.

    It must not see what it is to predict, and its own logits must be those of `language_logits`. Of a network without
    weights, on the meta device, the configuration alone is looked at.
    """
    if model.device.type == "meta":
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

        encoder = model.config.model_type in ENCODERS and getattr(model.config, "is_decoder", None) is False
        return "it sees the tokens that it is to predict" if encoder else None
    device = model.get_input_embeddings().weight.device
    row_1T = torch.arange(4, 12, device=device)[None]
    other_1T = torch.cat([row_1T[:, :-1], row_1T[:, :1]], dim=1)
    training = model.training
    model.eval()
    with torch.no_grad():
        own_TV, other_TV = (model(input_ids=ids).logits[0].float() for ids in (row_1T, other_1T))
        states_TD = model.base_model(input_ids=row_1T, use_cache=False).last_hidden_state[0]
        found_TV = language_logits(model, states_TD)
    model.train(training)
    if float((own_TV[:-1] - other_TV[:-1]).norm() / own_TV.norm()) > NO_DIFFERENCE:
        return "it sees the tokens that it is to predict"
    difference = float((found_TV - own_TV).norm() / own_TV.norm())
    if difference > tolerance(model, states_TD.dtype):
        return f"its logits are not those of its last layer alone (relative difference {difference:.1e})"
    return None


def reads_last_token(model: "PreTrainedModel") -> bool:
    """Whether a classifier pools as decoders do in transformers, where the last layer is then named score."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def position_room(config: "PretrainedConfig") -> int:
    """For how many tokens a backbone has positions, or was trained on rotary ones.

    Rotary positions that YaRN, or a linear or dynamic factor, stretches reach `factor` times as far as those of the
    pretraining, which `max_position_embeddings` says where `original_max_position_embeddings` does not.
    """
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") in STRETCHED:
        original = rotary.get("original_max_position_embeddings") or positions
        positions = max(positions, int(original * (rotary.get("factor") or 1)))
    return positions - (config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0)


def read_out(model: "PreTrainedModel") -> nn.Linear:
    """The layer that turns a pooled state into the classes' logits: the last linear one."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(LABELS)]
    if not layers:
        raise UserError(f"{type(model).__name__} ends in no linear layer", "Use --model.pooling auto.")
    return layers[-1]


def _prepare(
    config: "PretrainedConfig", head: Head, tokenizer: "PreTrainedTokenizerFast", dropout: float | None
) -> None:
    if head == "classifier":
        config.num_labels = len(LABELS)
        config.id2label = dict(LABELS)
        config.label2id = {label: index for index, label in LABELS.items()}
        config.problem_type = "single_label_classification"
    else:
        config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if dropout is not None:
        for name, value in config.to_dict().items():
            if isinstance(value, (int, float)) and ("dropout" in name or name.endswith("pdrop")):
                setattr(config, name, dropout)


@contextlib.contextmanager
def _clear_errors(head: Head, name: str) -> Iterator[None]:
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a foreign or damaged configuration, or file, makes transformers say
        reason = error_text(error, 300)
        raise UserError(
            f"model.backbone: cannot make a {head} of {name}: {reason}",
            "Give a hub id that this machine can reach, or a folder that save_pretrained wrote as safetensors.",
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes on new heads and the loading bars, which every start causes."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
