"""Self-checks detect backbones that treat long texts differently, and rows whose results depend on other rows.

Shape legend: R rows, T tokens, D hidden size.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from datamodules.batching.layouts import Inputs, TreeLayout
from datamodules.errors import UserError
from models.decoding.branch_checks import branch_problem
from models.learning.reward_classifier import RewardClassifier
from models.networks.heads import classify, last_states
from models.networks.self_checks import TOLERANCE, padding_problem, relative_difference, run_in_float32
from models.networks.tree_reading import choose_attention, tree_problem
from tests.models.small import EVERY_FAMILY as SIZES
from tests.models.small import VOCABULARY, fit, small_data

LONG, SHORT = 120, 24
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 4.0, 7.0, 10.0],
    "original_max_position_embeddings": 48,
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
GPT_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 64}
# All that changes with length: windows under several names, chunks, keys chosen by strength, rotary factors.
CHANGES_WITH_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-Neo's window": ("gpt_neo", GPT_NEO),
    "a sliding window": ("mistral", {"sliding_window": 64}),
    "a window in some layers": ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    "gpt-oss": ("gpt_oss", {"sliding_window": 64, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "ModernBERT's decoder": ("modernbert-decoder", {"local_attention": 128}),
    "the strongest keys": ("doge", {"keep_window_size": 64}),
    "longrope": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 48}),
    "dynamic rope": ("llama", {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 48}),
}
ONLY_LANGUAGE = {
    "chunks": ("llama4_text", {"attention_chunk_size": 64, "num_local_experts": 2, "intermediate_size_mlp": 48})
}


def network(family: str, settings: dict[str, Any], auto: Any = AutoModelForSequenceClassification) -> PreTrainedModel:
    """With weights so large that the output depends on what the network sees."""
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if not (family == "gpt_neo" and name.startswith("num_"))}
    made = auto.from_config(AutoConfig.for_model(family, **{**sizes, "num_labels": 2, **settings})).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2)
    return made


def rows() -> list[list[int]]:
    """Short and long rows with a common trunk."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, VOCABULARY, (400,), generator=generator).tolist()
    return [[*tokens[:shared], *tokens[at : at + own]] for shared, own, at in ((9, 6, 60), (20, 5, 90), (60, 60, 120))]


def alone(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits
                for row in ids
            ]
        )


@pytest.fixture(autouse=True)
def by_trial_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the names of windows, so that only self-checks can find them."""
    monkeypatch.setattr("models.networks.self_checks.attention_window", lambda config: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CHANGES_WITH_LENGTH)
def test_self_checks_detect_networks_that_depend_on_the_length(kind: str, dtype: torch.dtype) -> None:
    """Also in bfloat16, where rounding hides much of the difference."""
    model = network(*CHANGES_WITH_LENGTH[kind]).to(dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    problem = choose_attention(model, "cpu", LONG)
    assert "a tree gives other states than its rows one by one" in str(problem)
    assert f"in a tree of {2 * LONG} tokens with rows of up to {LONG}" in str(problem)
    assert model.config._attn_implementation != "sdpa_blockwise"
    assert choose_attention(model, "cpu", SHORT) is None
    after = model.state_dict()
    assert all(
        torch.equal(weight, after[name]) and weight.dtype == after[name].dtype for name, weight in before.items()
    )


@pytest.mark.parametrize("kind", CHANGES_WITH_LENGTH | ONLY_LANGUAGE)
def test_self_checks_detect_answers_that_depend_on_the_length(kind: str) -> None:
    model = network(*(CHANGES_WITH_LENGTH | ONLY_LANGUAGE)[kind], auto=AutoModelForCausalLM)
    problem = branch_problem(model, LONG)
    assert "the logits of an answer differ from those after its prompt" in str(problem)
    assert f"for prompts with answers of up to {LONG} tokens" in str(problem)
    # GPT-Neo's window counts what stands between, and branches stand between.
    assert (branch_problem(model, SHORT) is None) == (kind != "GPT-Neo's window")


def test_self_checks_detect_a_window_over_tree_indices_in_a_large_tree_of_short_rows() -> None:
    """GPT-Neo's window counts tokens of other branches, which a row of 24 tokens does not have."""
    model = network(*CHANGES_WITH_LENGTH["GPT-Neo's window"])
    assert tree_problem(model, SHORT, 2 * SHORT) is None
    assert "other states" in str(tree_problem(model, SHORT, 400))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "opt", "mixtral", "smollm3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_that_do_not_depend_on_the_length_pass(family: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {}
    settings = {**options, **({"num_local_experts": 4} if family == "mixtral" else {})}
    model = network(family, settings).to(dtype)
    assert choose_attention(model, "cpu", LONG, 400) is None
    assert padding_problem(model, lambda inputs: classify(model, inputs, "auto"), LONG) is None
    ids = rows()
    laid_out = TreeLayout(ids, 400).lay_out(range(len(ids)))
    with torch.no_grad():
        found = classify(model, laid_out.inputs, "auto")[torch.tensor(laid_out.rows).argsort()]
    assert relative_difference(found, alone(model, ids)) < 10 * TOLERANCE[dtype]


def test_a_self_check_in_float32_computes_in_float32_and_restores_the_weights() -> None:
    model = network("llama", {}).to(torch.bfloat16)
    weights = dict(model.named_parameters())
    data = {name: weight.data_ptr() for name, weight in weights.items()}
    ids_1T = torch.arange(5, 15)[None]
    seen: list[Any] = []

    def check() -> str | None:
        seen.append(model(ids_1T).logits.dtype)
        raise ValueError("in the middle of it")

    with pytest.raises(ValueError, match="in the middle"), torch.no_grad():
        run_in_float32(model, check)
    assert seen == [torch.float32, torch.bfloat16]  # what fails in float32 is tried in the network's own dtype
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == data
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("longrope", "a row gives other results beside a longer one than alone"), ("GPT-Neo's window", None)],
)
@pytest.mark.parametrize("head", ["classifier", "language model"])
def test_self_checks_detect_rows_that_depend_on_other_rows(kind: str, reason: str | None, head: str) -> None:
    if head == "classifier":
        model = network(*CHANGES_WITH_LENGTH[kind])
        problem = padding_problem(model, lambda inputs: classify(model, inputs, "auto"), LONG)
        assert padding_problem(model, lambda inputs: classify(model, inputs, "auto"), SHORT) is None
    else:
        model = network(*CHANGES_WITH_LENGTH[kind], auto=AutoModelForCausalLM)
        problem = padding_problem(model, lambda inputs: last_states(model, inputs), LONG)
    assert (problem is None) == (reason is None)
    assert (reason or "None") in str(problem)


def test_a_network_that_depends_on_earlier_rows_is_refused() -> None:
    """With dynamic rope the result for a row depends on all earlier rows."""
    model = network(*CHANGES_WITH_LENGTH["dynamic rope"])
    with pytest.raises(UserError, match="depends on the rows that it read before"):
        padding_problem(model, lambda inputs: classify(model, inputs, "auto"), LONG)


def test_a_network_that_reads_no_rows_is_refused() -> None:
    model = network("llama", {})

    def read(inputs: Inputs) -> Tensor:
        raise TypeError("forward() got an unexpected keyword argument 'attention_mask'")

    with pytest.raises(UserError, match="cannot read rows of 120 tokens: it refuses rows"):
        padding_problem(model, read, LONG)


@pytest.mark.parametrize("layout", ["auto", "rows"])
def test_rows_that_depend_on_other_rows_are_computed_one_by_one(
    layout: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So trees, padded rows and single rows agree: all are computed one by one, and the log says why."""
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("proactive"), "info", lambda text, *_: said.append(text))
    scratch = {**SIZES, "model_type": "phi3", "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 48}
    del scratch["vocab_size"]
    data = small_data(root, layout=layout, micro_batch_size=4, max_length=160, token_budget=400)
    model = RewardClassifier(scratch=scratch, dropout=0.0)
    fit(model, data, max_steps=1)
    assert data.layout == "rows"
    assert data.micro_batch_size == 1
    assert sum("data.micro_batch_size: 1, because padded rows are not possible" in text for text in said) == 1
    lengths = [batch["inputs"]["input_ids"].shape for step in data.test_dataloader() for batch in step]
    assert {rows for rows, _ in lengths} == {1}
    assert min(length for _, length in lengths) < 160


def test_the_longest_row_of_the_data_decides_not_max_length(root: Path) -> None:
    """A window longer than all rows is no problem, even if data.max_length is longer than the window."""
    data = small_data(root, layout="auto", max_length=400, token_budget=800)
    data.setup("fit")
    assert data.longest < 400
    assert data.longest == max(len(row) for stage in data.encoded.values() for row in stage.input_ids)
    assert data.largest_tree == 800
    scratch = {**SIZES, "model_type": "mistral", "sliding_window": data.longest}
    del scratch["vocab_size"]
    fit(RewardClassifier(scratch=scratch, dropout=0.0), data, max_steps=1)
    assert data.layout == "tree"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_self_check_compiles_nothing_and_computes_in_full_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled blocks and FlexAttention run eagerly, with full float32 products, whatever the run's options are."""
    from torch._dynamo.utils import counters

    model = network("llama", {"head_dim": 16}).to(dtype)
    model.set_attn_implementation("flex_attention")
    for block in model.base_model.layers:
        block.compile(dynamic=True)
    asked = torch.get_float32_matmul_precision()
    seen = set()
    model.base_model.register_forward_pre_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    counters.clear()
    try:
        torch.set_float32_matmul_precision("high")
        assert tree_problem(model, 64) is None
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(asked)
    assert seen == {"highest"}
    assert counters["stats"]["unique_graphs"] == 0
    assert model.config._attn_implementation == "flex_attention"
