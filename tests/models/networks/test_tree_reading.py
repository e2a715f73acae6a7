"""Trees and rows give the same loss and the same gradient of each parameter, or a refusal with a reason."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from datamodules.batching.layouts import Layout, RowsLayout, TreeLayout, ancestors
from datamodules.batching.reward_rows import RewardDataModule
from datamodules.batching.steps import EncodedRows, StepSampler, micro_batches_of_rank
from models.learning.reward_classifier import RewardClassifier
from models.learning.training import BackboneModule
from models.networks.attention import BLOCKWISE, QUERY_BLOCK, tree_blocks
from models.networks.tree_reading import choose_attention, pair_cost, tree_mask, tree_problem
from tests.helpers import PROACTIVEBENCH, SMALL_BACKBONE, needs_proactivebench
from tests.models.small import EVERY_FAMILY, VOCABULARY, small_trainer

SMALL: dict[str, Any] = {
    **EVERY_FAMILY,
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"), 0.0),
}


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox"]


TRUNK = [5, 6, 7, 8, 9]


CASES = {
    "a scene": [[*TRUNK, 10, 11], [*TRUNK, 10, 12, 13], [*TRUNK, 14], [*TRUNK, 14, 15, 16, 17], [*TRUNK, 18]],
    "one row": [[*TRUNK, 10, 11]],
    "one row a tree": [[1, 2, 3], [4, 5, 6, 7], [8, 9]],
    "identical rows": [[*TRUNK, 10], [*TRUNK, 10], [*TRUNK, 11], [*TRUNK, 10]],
    "empty history": [[5, 20, 21], [5, 22], [5, 6, 7, 20, 21]],
    "a proposal that begins another": [[*TRUNK, 10], [*TRUNK, 10, 11], [*TRUNK, 10, 11, 12]],
    "truncated histories": [[5, 6, 7, 8, 20], [5, 7, 8, 9, 21], [5, 8, 9, 10, 22], [5, 6, 7, 8, 23]],
}


Gradients = dict[str, Tensor]


def network(family: str, attention: str | None = None, **settings: Any) -> PreTrainedModel:
    """A small backbone with an attention of transformers, or the default attention for trees on a CPU."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **settings})
    made = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention).train()
    if attention is None:
        choose_attention(made, "cpu", longest=1024)
    return made


def branches(trunk: int, number: int, length: int, seed: int = 0) -> list[list[int]]:
    """Rows that branch off a trunk at random indices."""
    random = np.random.default_rng(seed)
    shared = random.integers(1, VOCABULARY, trunk).tolist()
    leave = [*sorted(random.integers(1, trunk + 1, number - 1).tolist()), trunk]
    return [[*shared[:place], *random.integers(1, VOCABULARY, length).tolist()] for place in leave]


def classifier(backbone: PreTrainedModel, **options: Any) -> RewardClassifier:
    made = RewardClassifier(**options)
    made.network = backbone
    return made


@dataclass
class Result:
    """The micro-batches of one optimizer step."""

    loss: float
    gradients: Gradients
    parts: dict[str, float]  # the norms of the micro-batches' gradients, added up: what they are before they cancel


def step(model: RewardClassifier, layout: Layout, rows: Sequence[int], number: int) -> Result:
    """Loss and gradients; labels and categories depend on the rows' indices."""
    data = EncodedRows(layout, {"label": torch.arange(number) % 2, "category": torch.arange(number) % 4})
    return result_of(model, data[micro_batches_of_rank(layout.split(rows, 1), 0, 1, len(rows))])


def result_of(model: BackboneModule, micro_batches: Sequence[Any]) -> Result:
    """Loss and gradients of a step's micro-batches."""
    result = Result(0.0, {}, {})
    for micro_batch in micro_batches:
        model.zero_grad()
        loss = model.loss(micro_batch)
        loss.backward()
        result.loss += float(loss.detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                result.gradients[name] = result.gradients.get(name, 0) + parameter.grad
                result.parts[name] = result.parts.get(name, 0.0) + float(parameter.grad.norm())
    return result


def assert_same(found: Result, expected: Result, scale: dict[str, float]) -> None:
    """Relative difference below 1e-5.

    Gradients of rows may cancel, their rounding does not; so the measure is their norms before they are added. A
    gradient that is zero but for rounding, as that of a key's bias, is held against a thousandth of the longest.
    """
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference = float((found.gradients[name] - gradient).norm())
        assert difference <= 1e-5 * max(scale[name], 1e-3 * max(scale.values())), name


def assert_tree_is_rows(model: RewardClassifier, ids: list[list[int]], rows: Sequence[int], budget: int = 2048) -> None:
    """Compare a tree with rows one by one, and with padded rows."""
    tree = step(model, TreeLayout(ids, budget), rows, len(ids))
    alone, padded = (step(model, RowsLayout(ids, 0, size), rows, len(ids)) for size in (1, 4))
    assert_same(tree, alone, alone.parts)
    assert_same(tree, padded, alone.parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_and_rows_give_equal_loss_and_gradients_for_each_family(family: str) -> None:
    backbone = network(family)
    assert tree_problem(backbone, longest=1024) is None
    model = classifier(backbone)
    for ids in CASES.values():
        assert_tree_is_rows(model, ids, range(len(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_of_several_blocks_gives_equal_loss_and_gradients(family: str) -> None:
    """The trunk is longer than a block, and its branches take several more blocks."""
    backbone = network(family)
    assert backbone.config._attn_implementation == (BLOCKWISE if family != "gemma2" else "eager")
    ids = branches(QUERY_BLOCK + 20, 12, 20)
    assert_tree_is_rows(classifier(backbone), ids, range(len(ids)))


@pytest.mark.parametrize(
    "ids",
    [
        branches(2 * QUERY_BLOCK, 2, 1),  # the last block has one query
        branches(10, 3 * QUERY_BLOCK, 1),  # many tiny branches
        branches(3, 5, QUERY_BLOCK + 1, seed=1),  # no branch in one block
        [[1, 2, *[3] * length] for length in range(QUERY_BLOCK - 3, QUERY_BLOCK + 3)],  # rows that begin the next ones
    ],
)
def test_blocks_of_any_shape_give_equal_loss_and_gradients(llama: RewardClassifier, ids: list[list[int]]) -> None:
    assert_tree_is_rows(llama, ids, range(len(ids)))


def test_blocks_compute_the_mask_and_few_masked_pairs() -> None:
    ids = branches(QUERY_BLOCK + 20, 30, 20)
    inputs = TreeLayout(ids, 4096).lay_out(range(len(ids))).inputs
    end, read = inputs["subtree_end"][0], inputs["read_out"]
    blocks = tree_blocks(end, read)
    for part in (blocks.all_queries, blocks.read_queries):
        visible = torch.zeros(len(end), len(end), dtype=torch.bool)
        keys = part.keys.split([mask.shape[-1] for mask in part.masks])
        for query, key, mask in zip(part.queries.split(QUERY_BLOCK), keys, part.masks, strict=True):
            visible[query[:, None], key] = mask[0, 0]
            assert mask[0, 0].any(0).sum() >= len(key) - len(query)  # a key that none sees is one of the block's own
        assert torch.equal(visible[part.queries], ancestors(end)[part.queries])
    assert sum(mask.numel() for mask in blocks.all_queries.masks) < len(end) ** 2 / 2


def test_a_backbone_without_support_for_blocks_keeps_its_attention() -> None:
    backbone = network("llama", "sdpa")
    inner = backbone.model.forward

    def forward(input_ids: Tensor, position_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:
        return inner(input_ids, attention_mask, position_ids, use_cache=use_cache)

    backbone.model.forward = forward
    choose_attention(backbone, "cpu", longest=1024)
    assert backbone.config._attn_implementation == "sdpa"
    assert_tree_is_rows(classifier(backbone), CASES["a scene"], range(5))


def test_a_backbone_that_ignores_the_blocks_uses_the_mask() -> None:
    backbone = network("llama")
    inner = backbone.model.forward
    backbone.model.forward = lambda tree_blocks=None, **inputs: inner(**inputs)
    assert tree_problem(backbone, longest=1024) is None
    assert_tree_is_rows(classifier(backbone), CASES["a scene"], range(5))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attentions_with_masks_give_equal_loss_and_gradients(attention: str) -> None:
    backbone = network("llama", attention)
    assert tree_problem(backbone, longest=1024) is None
    assert_tree_is_rows(classifier(backbone), CASES["a scene"], range(5))


def test_category_weights_and_gradient_checkpointing_give_equal_loss_and_gradients() -> None:
    backbone = network("llama")
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
    model = classifier(backbone, category_weights={"missed_need": 2.0, "false_alarm": 0.25})
    for ids in (CASES["a scene"], branches(QUERY_BLOCK, 6, 20)):
        assert_tree_is_rows(model, ids, range(len(ids)))


@pytest.fixture(scope="module")
def llama() -> RewardClassifier:
    return classifier(network("llama"))


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=9), min_size=1, max_size=8),
    st.integers(9, 40),
    st.data(),
)
def test_random_trees_give_equal_loss_and_gradients(
    llama: RewardClassifier, ids: list[list[int]], budget: int, data: st.DataObject
) -> None:
    """Random rows, a random choice of them in a step, some twice, in as many micro-batches as the budget requires."""
    assert llama.network is not None
    assert llama.network.config._attn_implementation == BLOCKWISE
    rows = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=10))
    assert_tree_is_rows(llama, ids, rows, budget)


@needs_proactivebench
@pytest.mark.parametrize("max_length", [1024, 180])  # none, and most, of the rows lose their oldest events
def test_a_real_scene_gives_equal_loss_and_gradients(max_length: int) -> None:
    data = RewardDataModule(root=str(PROACTIVEBENCH), split="published", max_length=max_length, vocabulary_size=1000)
    data.setup("fit")
    assert (data.truncated["train"] > 400) == (max_length == 180)
    scenes = [row.scene for row in data.split.train]
    ids = [row.tolist() for row in data.encoded["train"].input_ids]
    rows = [place for place, scene in enumerate(scenes) if scene == scenes[0]][:24]
    rows.append(scenes.index(next(scene for scene in scenes if scene != scenes[0])))
    model = classifier(network("qwen2", vocab_size=len(data.tokenizer)))
    for budget in (4096, max_length):  # one tree, and several
        assert_tree_is_rows(model, ids, rows, budget)


class Losses(Callback):
    """The logged loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


@needs_proactivebench
def test_an_epoch_on_the_real_rows_has_the_same_loss_curve() -> None:
    curves = []
    for layout in ("tree", "rows"):
        torch.manual_seed(0)
        losses = Losses()
        trainer = small_trainer(losses, limit_val_batches=0, num_sanity_val_steps=0)
        scratch = {**SMALL_BACKBONE, "attention_dropout": 0.0}
        data = RewardDataModule(root=str(PROACTIVEBENCH), split="published", layout=layout, vocabulary_size=1000)
        trainer.fit(RewardClassifier(scratch=scratch), data)
        assert data.layout == layout
        curves.append(losses.values)
    assert len(curves[0]) == -(-len(data.split.train) // 32)
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_pair_cost_is_relative_to_the_layers_without_embeddings() -> None:
    """2 x layers x hidden size / weights of the layers: here 4 projections of 32 x 32 and 3 of 32 x 48 per layer."""
    backbone = network("llama", "sdpa", num_key_value_heads=4)
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert pair_cost(backbone) == pytest.approx(2 * 2 * 32 / weights)
    choose_attention(backbone, "cpu", longest=1024)
    assert pair_cost(backbone) == 0


def test_a_block_mask_equals_the_plain_mask() -> None:
    """Only the mask: FlexAttention has no backward pass on a CPU."""
    layout = TreeLayout(CASES["a scene"], 64)
    end = layout.lay_out(range(5)).inputs["subtree_end"][0]
    block_mask = tree_mask(end, "flex_attention", torch.float32)
    places = torch.arange(len(end))
    visible = block_mask.mask_mod(0, 0, places[:, None], places[None, :])
    assert torch.equal(visible, ancestors(end))
    assert block_mask.shape[-2:] == (128, 128)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention has no backward on a CPU, and there is no CUDA device"
)
def test_flex_attention_gives_equal_results_and_compiles_once() -> None:
    from torch._dynamo.utils import counters

    backbone = network("llama", hidden_size=128, head_dim=32).cuda()
    masked = network("llama", "sdpa", hidden_size=128, head_dim=32).cuda()
    backbone.set_attn_implementation("flex_attention")
    assert tree_problem(backbone, longest=1024) is None
    counters.clear()
    for case in ("a scene", "identical rows", "one row a tree"):
        ids = [row * 40 for row in CASES[case]]  # over several blocks, each case of another shape
        results = []
        for model in (classifier(backbone), classifier(masked)):
            layout = TreeLayout(ids, 4096)
            data = EncodedRows(
                layout, {name: torch.zeros(len(ids), dtype=torch.int64) for name in ("label", "category")}
            )
            model.to("cuda").zero_grad()
            for micro_batch in data[micro_batches_of_rank(layout.split(range(len(ids)), 1), 0, 1, len(ids))]:
                moved = {k: v.cuda() for k, v in micro_batch.items() if k != "inputs"}
                inputs = {k: v.cuda() for k, v in micro_batch["inputs"].items()}
                model.loss({**moved, "inputs": inputs}).backward()
            results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert float((results[0] - results[1]).norm() / results[1].norm()) < 1e-3
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] <= 2  # the first shape, then one graph for every other


def test_steps_are_the_same_in_both_layouts() -> None:
    ids = CASES["a scene"] * 4
    samplers = [
        StepSampler(layout, [f"{row % 3}" for row in range(len(ids))], 8, 2, seed=3)
        for layout in (TreeLayout(ids, 64), RowsLayout(ids, 0, 2))
    ]
    rows = [[sorted(row for part in share_ for row in part.rows) for share_ in sampler] for sampler in samplers]
    assert rows[0] == rows[1]
