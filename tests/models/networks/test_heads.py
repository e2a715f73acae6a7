"""What heads compute for backbones of many families: pooling, padding, dropout and attentions.

Shape legend: B rows, T tokens, D hidden size, C classes.
"""

from typing import Any, get_args

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from datamodules.batching.layouts import Inputs
from models.networks.building import build_network
from models.networks.heads import Pooling, classify
from models.networks.network_options import NetworkOptions
from tests.models.small import DECODERS, ENCODERS, FAMILIES

LENGTHS = (9, 5, 1)  # rows of one batch: none, some and nearly all of it padding
READ_OUT = dict.fromkeys(DECODERS, "score") | dict.fromkeys(ENCODERS, "classifier") | {"roberta": "classifier.out_proj"}


def build(family: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    scratch = {"model_type": family, **FAMILIES[family]}
    return build_network(NetworkOptions("classifier", scratch=scratch, **options), tokenizer).eval()


def padded_batch(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    ids_BT = torch.randint(5, 200, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask_BT = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return ids_BT.masked_fill(mask_BT == 0, tokenizer.pad_token_id), mask_BT


@pytest.mark.parametrize("pooling", get_args(Pooling))
@pytest.mark.parametrize("family", FAMILIES)
def test_pooling_equals_a_computation_by_hand_with_and_without_padding(
    family: str, pooling: Pooling, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(family, tokenizer)
    ids_BT, mask_BT = padded_batch(tokenizer)
    head = model.get_submodule(READ_OUT[family])
    with torch.no_grad():
        logits_BC = classify(model, Inputs(input_ids=ids_BT, attention_mask=mask_BT), pooling)
        for row, length in enumerate(LENGTHS):
            alone = {"input_ids": ids_BT[row : row + 1, :length], "attention_mask": mask_BT[row : row + 1, :length]}
            hidden_TD = model.base_model(**alone).last_hidden_state[0]
            if pooling == "auto" and family in ENCODERS:
                expected_C = model(**alone).logits[0]
            else:
                read_D = {"cls": hidden_TD[0], "mean": hidden_TD.mean(0)}.get(pooling, hidden_TD[-1])
                expected_C = head.weight @ read_D + (0 if head.bias is None else head.bias)
            torch.testing.assert_close(logits_BC[row], expected_C, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pooling_auto_equals_the_transformers_class(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """So an exported model gives the same probabilities without this project."""
    model = build(family, tokenizer)
    ids_BT, mask_BT = padded_batch(tokenizer)
    with torch.no_grad():
        plain_BC = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        torch.testing.assert_close(
            classify(model, Inputs(input_ids=ids_BT, attention_mask=mask_BT), "auto"), plain_BC, atol=2e-6, rtol=1e-4
        )


def test_a_padding_token_inside_a_row_does_not_end_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    """Models without a padding token pad with the end token, which a prompt can contain."""
    model = build("llama", tokenizer)
    ids_BT, mask_BT = padded_batch(tokenizer)
    ids_BT[1, 4] = tokenizer.pad_token_id
    with torch.no_grad():
        together = classify(model, Inputs(input_ids=ids_BT, attention_mask=mask_BT), "auto")[1]
        hidden_TD = model.base_model(ids_BT[1:2, :5], mask_BT[1:2, :5]).last_hidden_state[0]
        torch.testing.assert_close(together, model.score.weight @ hidden_TD[-1], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "distilbert", "deberta-v2", "modernbert"])
def test_dropout_sets_all_dropouts_of_the_backbone(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    ids_BT, mask_BT = padded_batch(tokenizer)
    for dropout in (0.0, 0.4):
        model = build(family, tokenizer, dropout=dropout).train()
        layers = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        assert set(layers) <= {dropout}
        with torch.no_grad():
            one, two = (classify(model, Inputs(input_ids=ids_BT, attention_mask=mask_BT), "auto") for _ in range(2))
        assert torch.equal(one, two) == (dropout == 0.0)


def test_dropout_keeps_the_configured_values_by_default(tokenizer: PreTrainedTokenizerFast) -> None:
    scratch = {"model_type": "bert", **ENCODERS["bert"], "hidden_dropout_prob": 0.3}
    model = build_network(NetworkOptions("classifier", scratch=scratch), tokenizer)
    assert model.config.hidden_dropout_prob == 0.3
    assert model.config.attention_probs_dropout_prob == 0.1


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_attentions_compute_the_same(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    ids_BT, mask_BT = padded_batch(tokenizer)
    logits = []
    for attention in ("eager", "sdpa"):
        model = build(family, tokenizer, attn_implementation=attention)
        assert model.config._attn_implementation == attention
        with torch.no_grad():
            logits.append(classify(model, Inputs(input_ids=ids_BT, attention_mask=mask_BT), "mean"))
    torch.testing.assert_close(*logits, atol=2e-6, rtol=1e-4)


def test_reads_last_token_distinguishes_decoders_from_encoders(tokenizer: PreTrainedTokenizerFast) -> None:
    """Without `pooling`, a decoder reads its last real token, and an encoder does not."""
    ids_BT, mask_BT = padded_batch(tokenizer)
    with torch.no_grad():
        for family in FAMILIES:
            model = build(family, tokenizer)
            auto, last = (
                classify(model, Inputs(input_ids=ids_BT, attention_mask=mask_BT), pooling)
                for pooling in ("auto", "last")
            )
            assert torch.equal(auto, last) == (family in DECODERS), family
