"""The heads: class logits, or losses of tokens, computed from a backbone's hidden states.

Shape legend: R rows, T tokens, D hidden size, C classes (rejected, accepted), L tokens to predict, V vocabulary.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datamodules.batching.layouts import Inputs
from datamodules.errors import UserError
from models.networks.configurations import LABELS
from models.networks.forward import as_forward
from models.networks.self_checks import EXACT_TOLERANCE, tolerance
from models.networks.tree_reading import read_tree, tree_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pooling = Literal["auto", "last", "cls", "mean"]
MAX_LOGITS = 2**25  # of one chunk: 128 MiB in float32, and as much again for their gradients


@as_forward
def classify(model: "PreTrainedModel", inputs: Inputs, pooling: Pooling) -> Tensor:
    """Logits of the two classes.

    Args:
        model: A sequence classifier of transformers.
        inputs: Padded rows or a tree.
        pooling: Which hidden states the head reads. "auto" is what transformers defines for the backbone: the last
            real token for a decoder, usually CLS for an encoder. "last", "cls" and "mean" read the final hidden
            states, and apply only the last linear layer. A tree is always read at the last token of each row.

    Returns:
        (R, C) floating logits.
    """
    if "subtree_end" in inputs:
        return classify_states(model, read_tree(model, inputs))
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    if pooling == "auto" and not reads_last_token(model):
        return model(input_ids=input_ids, attention_mask=attention_mask).logits
    options = {"use_cache": False} if reads_last_token(model) else {}  # encoders do not take it
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
    """The final hidden states (R, D) at the last tokens of padded rows."""
    output = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    return _at_last_token(output.last_hidden_state, inputs["attention_mask"])


def _at_last_token(hidden_RTD: Tensor, attention_mask: Tensor) -> Tensor:
    rows_R = torch.arange(len(hidden_RTD), device=hidden_RTD.device)
    return hidden_RTD[rows_R, attention_mask.sum(1) - 1]


def classify_states(model: "PreTrainedModel", pooled_RD: Tensor) -> Tensor:
    """Logits (R, C) of the classes from pooled hidden states (R, D)."""
    layer = class_layer(model)  # float32 in a backbone with adapters, whatever the backbone's dtype
    return layer(pooled_RD if pooled_RD.dtype == torch.float32 else pooled_RD.to(layer.weight.dtype))


@as_forward
def token_losses(model: "PreTrainedModel", inputs: Inputs, predicted_at: Tensor, target: Tensor) -> Tensor:
    """The cross-entropy of each token to predict.

    It is computed in chunks, whose logits are recomputed in the backward pass. So no more than `MAX_LOGITS` logits
    exist at once. PyTorch's chunked loss, `linear_cross_entropy`, returns only sums, but rows have weights here; and
    it cannot cap logits.

    Args:
        model: A causal language model of transformers.
        inputs: Padded rows or a tree.
        predicted_at: (L,) int64, for each token the index of the hidden state that predicts it.
        target: (L,) int64, the token ids.

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
    chunk = max(MAX_LOGITS // model.config.get_text_config().vocab_size, 1)

    def losses(part_LD: Tensor, part_target_L: Tensor) -> Tensor:
        return nn.functional.cross_entropy(language_logits(model, part_LD), part_target_L, reduction="none")

    parts = zip(hidden_LD.split(chunk), target.split(chunk), strict=True)
    if len(target) <= chunk:
        return torch.cat([losses(*part) for part in parts])
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


def language_logits(model: "PreTrainedModel", hidden_LD: Tensor) -> Tensor:
    """The logits (L, V) float32 of a language model from its final hidden states (L, D)."""
    logits_LV = model.get_output_embeddings()(hidden_LD)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2's
    if cap is not None:
        logits_LV = torch.tanh(logits_LV / cap) * cap
    return logits_LV.float()


@as_forward
def language_problem(model: "PreTrainedModel") -> str | None:
    """Check that a network can be trained as a causal language model, on a short row.

    Its logits must not depend on later tokens, and must equal those of `language_logits`. For a network on the meta
    device only the configuration is checked.

    Returns:
        What is wrong, or None.
    """
    if model.device.type == "meta":
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

        encoder = model.config.model_type in ENCODERS and getattr(model.config, "is_decoder", None) is False
        return "it attends to the tokens that it predicts" if encoder else None
    device = model.get_input_embeddings().weight.device
    row_1T = torch.arange(4, 12, device=device)[None]
    other_end_1T = torch.cat([row_1T[:, :-1], row_1T[:, :1]], dim=1)
    training = model.training
    model.eval()
    with torch.no_grad():
        expected_TV = model(input_ids=row_1T).logits[0].float()
        other_end_TV = model(input_ids=other_end_1T).logits[0].float()
        states_TD = model.base_model(input_ids=row_1T, use_cache=False).last_hidden_state[0]
        found_TV = language_logits(model, states_TD)
    model.train(training)
    if float((expected_TV[:-1] - other_end_TV[:-1]).norm() / expected_TV.norm()) > EXACT_TOLERANCE:
        return "it attends to the tokens that it predicts"
    difference = float((found_TV - expected_TV).norm() / expected_TV.norm())
    if difference > tolerance(model, states_TD.dtype):
        return f"its logits are not those of its last layer alone (relative difference {difference:.1e})"
    return None


def reads_last_token(model: "PreTrainedModel") -> bool:
    """Whether a classifier pools as decoders of transformers do: their last layer is named `score`."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def class_layer(model: "PreTrainedModel") -> nn.Linear:
    """The layer from pooled hidden states to class logits: the last linear one.

    Raises:
        UserError: The network does not end in a linear layer.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(LABELS)]
    if not layers:
        raise UserError(f"{type(model).__name__} does not end in a linear layer", "Use --model.pooling auto.")
    return layers[-1]
