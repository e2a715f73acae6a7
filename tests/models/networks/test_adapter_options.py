"""Options and targets of adapters: what is refused before weights are loaded, and what the log says."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoConfig, AutoModelForCausalLM

from datamodules.errors import UserError
from models.learning.reward_classifier import RewardClassifier
from models.networks.adapter_files import merged_state
from models.networks.adapters import AdapterOptions, add_adapter, linear_layers, target_layers
from models.networks.configurations import meta_network
from models.networks.network_options import Head, NetworkOptions
from tests.models.networks.test_adapters import classifier, reward_data
from tests.models.small import FAMILIES, LLAMA, fit, small_trainer


def test_options_that_do_not_fit_together_are_refused_before_weights_are_loaded(
    root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(model: RewardClassifier, **options: Any) -> str:
        trainer = small_trainer(**options)
        with pytest.raises(UserError) as caught:
            trainer.fit(model, reward_data(root, base))
        assert model.network is None
        return str(caught.value)

    assert "in nf4 cannot be trained" in refusal(RewardClassifier(backbone=str(base), quantization="nf4"))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert 'pip install -e ".[adapters]"' in refusal(classifier(base, "none"))


def test_a_sharded_backbone_is_refused(base: Path) -> None:
    from models.networks.adapters import refuse_unfit_adapter

    with pytest.raises(UserError, match="the strategy is ModelParallelStrategy"):
        refuse_unfit_adapter(AdapterOptions(), "nf4", ModelParallelStrategy())


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError, match="rank"):
        AdapterOptions(rank=0)
    with pytest.raises(UserError, match="dropout"):
        AdapterOptions(dropout=1.0)


def weightless(kind: str, head: Head, **options: Any) -> Any:
    config = AutoConfig.for_model(kind, **{**FAMILIES[kind], "vocab_size": 300, "pad_token_id": 0, **options})
    if head == "classifier":
        config.num_labels = 2
    return meta_network(NetworkOptions(head, kind), config)


@pytest.mark.parametrize(
    ("kind", "head", "target", "message"),
    [
        ("llama", "classifier", "nothing_proj", "LlamaForSequenceClassification has no such layer"),
        ("llama", "classifier", "proj", "has no such layer"),  # the end of a name, not a name
        ("llama", "classifier", "score", "score is in the new head, which is trained as a whole"),
        ("roberta", "classifier", "out_proj", "out_proj is in the new head"),
        ("roberta", "classifier", "dense", "dense is in the new head"),  # as well as under it
        ("deberta-v2", "classifier", "pooler", "pooler is in the new head"),
        ("llama", "classifier", "embed_tokens", "embed_tokens is an embedding"),
        ("llama", "language model", "embed_tokens", "embed_tokens is an embedding"),
        ("gpt2", "language model", "wpe", "wpe is an embedding"),
        ("bert", "classifier", "word_embeddings", "word_embeddings is an embedding"),
        ("llama", "language model", "input_layernorm", "is not a linear layer but a LlamaRMSNorm"),
        ("llama", "language model", "self_attn", "is not a linear layer but a LlamaAttention"),
        ("gpt2", "language model", "lm_head", "lm_head shares its weights with the embeddings"),
        ("gemma3_text", "language model", "lm_head", "lm_head shares its weights with the embeddings"),
    ],
)
def test_impossible_targets_are_refused(kind: str, head: Head, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        target_layers(weightless(kind, head), head, AdapterOptions(targets=[target]))
    assert caught.value.what.startswith(f"model.adapter.targets: {target}")
    assert "Use all-linear, or some of" in caught.value.hint


def test_targets_are_checked_before_weights_are_loaded(root: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier(base, adapter={"targets": ["q_proj", "score"]})
    monkeypatch.setattr(
        "models.learning.network_module.build_network", lambda *_, **__: pytest.fail("weights are loaded")
    )
    with pytest.raises(UserError, match="score is in the new head"):
        fit(model, reward_data(root, base))


def test_an_untied_output_layer_can_have_an_adapter() -> None:
    """The merged network gives the same logits, and its embeddings do not change."""
    config = AutoConfig.for_model(**{**LLAMA, "vocab_size": 300, "pad_token_id": 0, "tie_word_embeddings": False})
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    embeddings = network.get_input_embeddings().weight.clone()
    add_adapter(network, "language model", AdapterOptions(rank=2, targets=["q_proj", "lm_head"]))
    for name, weight in network.named_parameters():
        if ".lora_" in name:
            weight.data.normal_(std=0.1)
    network.eval()
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict(merged_state(network, "none"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, network(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.get_input_embeddings().weight, embeddings)


def test_a_merge_of_plain_adapters_needs_no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, "vocab_size": 300}))
    add_adapter(network, "language model", AdapterOptions(rank=2))
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)
    state = merged_state(network, "none")
    assert not any("lora" in name for name in state)
    with pytest.raises(ImportError):
        merged_state(network, "nf4")


MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "vocab_size": 300}


def test_the_log_names_weights_without_adapters_and_their_fraction(caplog: pytest.LogCaptureFixture) -> None:
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTRAL))
    total = sum(weight.numel() for weight in network.parameters())
    experts = sum(weight.numel() for name, weight in network.named_parameters() if ".experts." in name)
    embeddings = network.get_input_embeddings().weight.numel()
    linear = sum(layer.weight.numel() for layer in linear_layers(network).values())
    targets = 2 * 2 * 64 * 64  # q_proj and o_proj of two layers
    with caplog.at_level("INFO", "proactive"):
        add_adapter(network, "language model", AdapterOptions(rank=2, targets=["q_proj", "o_proj"]), "nf4")
    packed = sum(2 * layer.weight.numel() for layer in network.modules() if isinstance(layer, Linear4bit))
    assert packed == linear
    said, quantized, warning = (record.getMessage() for record in caplog.records)
    assert said.startswith(
        f"model.adapter: adapters on 4 layers, which hold {targets / total:.1%} of the weights; not "
    )
    assert quantized.startswith(f"model.quantization: {linear / total:.1%} of the weights are kept in nf4; not ")
    assert f"embed_tokens.weight {embeddings / total:.1%}" in quantized
    assert "MixtralExperts.gate_up_proj, MixtralExperts.down_proj are not linear layers" in warning
    assert f"{experts / total:.1%} of the weights get no adapter and are not quantized" in warning
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]


def test_no_warning_without_fused_experts(caplog: pytest.LogCaptureFixture) -> None:
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, "vocab_size": 300}))
    with caplog.at_level("INFO", "proactive"):
        add_adapter(network, "language model", AdapterOptions(rank=2))
    assert [record.levelname for record in caplog.records] == ["INFO"]
