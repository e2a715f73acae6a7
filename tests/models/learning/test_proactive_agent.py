"""ProactiveAgent: the exact loss of answers, the decision to make an offer, checkpoints and exports."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import models.networks.heads
from datamodules.batching.answer_rows import AgentDataModule, AnswerKind
from datamodules.batching.layouts import Layout, RowsLayout, TreeLayout
from datamodules.batching.steps import EncodedRows, micro_batches_of_rank
from datamodules.corpus.answers import Answer, read_answer, write_answer
from datamodules.errors import UserError
from models.learning.answer_metrics import AnswerLosses, answer_losses, decisions, proposal_metrics
from models.learning.proactive_agent import ProactiveAgent
from models.learning.saved_models import export_weights, model_from_checkpoint, model_from_export
from models.networks.heads import language_logits, language_problem, token_losses
from models.networks.tree_reading import choose_attention
from tests.helpers import small_root
from tests.models.networks.test_tree_reading import CASES, FAMILIES, SMALL, Result, assert_same, branches, result_of
from tests.models.small import DECODERS, small_trainer


def network(family: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **options})).train()


def agent(backbone: PreTrainedModel, **options: Any) -> ProactiveAgent:
    made = ProactiveAgent(**options)
    made.network = backbone
    return made


def answers_of(ids: Sequence[Sequence[int]]) -> list[Any]:
    """The last two tokens of each row, or all but the first."""
    return [np.arange(max(len(row) - 2, 1), len(row)) for row in ids]


def step(model: ProactiveAgent, layout: Layout, rows: Sequence[int], number: int) -> Result:
    """Loss and gradients of a step; every third answer is null."""
    kinds = torch.tensor([AnswerKind.NULL if row % 3 == 0 else AnswerKind.TEXT for row in range(number)])
    data = EncodedRows(layout, {"kind": kinds, "help_needed": torch.zeros(number, dtype=torch.int64)})
    return result_of(model, data[micro_batches_of_rank(layout.split(rows, 1), 0, 1, 7)])


def assert_tree_is_rows(model: ProactiveAgent, ids: list[list[int]], rows: Sequence[int], budget: int = 2048) -> None:
    answers = answers_of(ids)
    tree = step(model, TreeLayout(ids, budget, answers=answers), rows, len(ids))
    alone, padded = (step(model, RowsLayout(ids, 0, size, answers), rows, len(ids)) for size in (1, 4))
    assert_same(tree, alone, alone.parts)
    assert_same(padded, alone, alone.parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_and_rows_give_equal_loss_and_gradients_for_each_family(family: str) -> None:
    backbone = network(family)
    assert language_problem(backbone) is None
    model = agent(backbone, null_weight=2.5)
    for ids in CASES.values():
        assert_tree_is_rows(model, ids, range(len(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_chosen_for_trees_gives_equal_losses(family: str) -> None:
    """Trees of several query blocks. The last layer computes only the states that predict answer tokens."""
    backbone = network(family)
    choose_attention(backbone, "cpu", longest=1024)
    ids = branches(trunk=300, number=9, length=12)
    assert_tree_is_rows(agent(backbone), ids, range(len(ids)), budget=2048)


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=9), min_size=1, max_size=8),
    st.integers(9, 40),
    st.data(),
)
def test_random_trees_give_equal_loss_and_gradients(ids: list[list[int]], budget: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, max_size=10))
    assert_tree_is_rows(agent(network("llama")), ids, rows, budget)


def test_the_loss_is_the_weighted_cross_entropy_of_the_answers() -> None:
    """Compared with the cross-entropy of the network's own logits, row by row."""
    backbone, ids = network("llama"), CASES["a scene"]
    expected = 0.0
    for number, (row, places) in enumerate(zip(ids, answers_of(ids), strict=True)):
        logits_TV = backbone(input_ids=torch.tensor([row])).logits[0]
        loss = nn.functional.cross_entropy(logits_TV[places - 1], torch.tensor(row)[places], reduction="sum")
        expected += float(loss) * (3.0 if number % 3 == 0 else 1.0) / 7
    layout = TreeLayout(ids, 2048, answers=answers_of(ids))
    assert step(agent(backbone, null_weight=3.0), layout, range(len(ids)), len(ids)).loss == pytest.approx(expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_give_the_plain_loss_and_gradients_with_few_logits_at_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, ids = network(family), CASES["a scene"] * 3
    rows = range(len(ids))
    model = agent(backbone)
    layout = TreeLayout(ids, 2048, answers=[np.arange(1, len(row)) for row in ids])
    whole = step(model, layout, rows, len(ids))
    seen: list[int] = []
    backbone.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.numel()))
    monkeypatch.setattr(models.networks.heads, "MAX_LOGITS", 3 * SMALL["vocab_size"] + 5)
    chunked = step(model, layout, rows, len(ids))
    assert_same(chunked, whole, whole.parts)
    assert max(seen) == 3 * SMALL["vocab_size"]
    assert len(seen) > 4


def test_an_encoder_is_detected() -> None:
    assert language_problem(network("bert")) == "it attends to the tokens that it predicts"


def test_a_backbone_that_changes_the_logits_after_its_last_layer_is_detected() -> None:
    assert "relative difference" in str(language_problem(network("cohere", logit_scale=0.25)))
    gemma = network("gemma2", final_logit_softcapping=0.5)
    assert language_problem(gemma) is None
    assert float(language_logits(gemma, torch.randn(3, SMALL["hidden_size"]) * 1e3).abs().max()) <= 0.5


def test_token_losses_of_no_tokens_are_empty() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    inputs: Any = RowsLayout([[1, 2, 3]], 0, 1).lay_out([0]).inputs
    assert token_losses(network("llama"), inputs, none, none).shape == (0,)


# What a fit does


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root(tmp_path_factory.mktemp("root"), scenes=18, rows_per_scene=20)


def small_agent(**options: Any) -> ProactiveAgent:
    scratch = {"model_type": "llama", **DECODERS["llama"]}
    return ProactiveAgent(**{"scratch": scratch, "learning_rate": 1e-2, "sampled_answers": 2, **options})


def small_data(root: Path, **options: Any) -> AgentDataModule:
    defaults: dict[str, Any] = {
        "root": str(root),
        "folds": 3,
        "vocabulary_size": 400,
        "batch_size": 8,
        "max_length": 400,
        "cache": False,
    }
    return AgentDataModule(**{**defaults, **options})


def fitted(root: Path, **options: Any) -> tuple[ProactiveAgent, AgentDataModule, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, data = small_agent(**options), small_data(root)
    trainer = small_trainer(max_epochs=6, num_sanity_val_steps=0)
    trainer.fit(model, data)
    return model, data, dict(trainer.callback_metrics)


@pytest.fixture(scope="module")
def trained(root: Path) -> tuple[ProactiveAgent, AgentDataModule, dict[str, Tensor]]:
    return fitted(root)


def test_a_fit_lowers_the_loss_and_logs_all_metrics(
    trained: tuple[ProactiveAgent, AgentDataModule, dict[str, Tensor]],
) -> None:
    model, _, logged = trained
    for name in ("loss", "loss_text", "loss_null", "precision", "recall", "f1", "auroc", "proposed", "json_validity"):
        assert math.isfinite(float(logged[f"validation/{name}"])), name
    assert float(logged["validation/loss"]) < 0.8 * math.log(400)
    assert len(model.samples) == 2
    for sample in model.samples:
        assert sample["valid"] is (read_answer(sample["answer"]) is not None)


def test_p_null_is_the_probability_of_the_tokens_that_distinguish_null(
    trained: tuple[ProactiveAgent, AgentDataModule, dict[str, Tensor]],
) -> None:
    """Compared with the network's own softmax at the tokens that distinguish null from an offer."""
    model, data, _ = trained
    small_trainer().test(model, data, verbose=False)
    probes = [e for e in data.rows("test") if e.kind == AnswerKind.PROBE]
    assert len(model.test_rows["probability"]) == len(probes)
    assert model.network is not None
    model.eval()
    silence = data.tokenizer(write_answer(Answer(proposal=None)), add_special_tokens=False).input_ids
    for number in (0, len(probes) // 2, len(probes) - 1):
        example = probes[number]
        ids = [t for segment in data.segments(example.history) for t in segment] + data.generation_prompt()
        row = [*ids, *silence, data.tokenizer.eos_token_id]
        with torch.no_grad():
            log_p_TV = model.network(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        first = next(
            place for place in range(len(ids), len(row)) if data.tokenizer.decode(row[len(ids) : place + 1])[12:]
        )
        p_null = math.exp(sum(float(log_p_TV[place - 1, row[place]]) for place in range(first, len(row))))
        assert float(model.test_rows["probability"][number]) == pytest.approx(1 - p_null, abs=1e-5)
        assert int(model.test_rows["target"][number]) == int(bool(example.help_needed))


def test_null_weight_shifts_the_decision(root: Path) -> None:
    quiet, eager = (float(fitted(root, null_weight=weight)[2]["validation/loss_null"]) for weight in (10.0, 0.0))
    assert quiet < eager - 0.1


def test_checkpoint_and_export_give_the_same_losses(
    trained: tuple[ProactiveAgent, AgentDataModule, dict[str, Tensor]], tmp_path: Path
) -> None:
    model, data, _ = trained
    (batch,) = next(iter(data.test_dataloader()))
    model.eval()
    with torch.no_grad():
        expected = model.row_losses(batch)
    assert model.network is not None
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    export_weights(model, tmp_path, data.state_dict())
    from_export, state = model_from_export(ProactiveAgent, tmp_path)
    for other in (model_from_checkpoint(ProactiveAgent, checkpoint), from_export):
        other.eval()
        with torch.no_grad():
            assert torch.allclose(other.row_losses(batch), expected, rtol=1e-5)  # it may attend in another way
        assert other.calibration == model.calibration is not None
    assert AgentDataModule.from_state(state).template == data.template


def test_an_export_of_the_other_model_is_refused(
    trained: tuple[ProactiveAgent, AgentDataModule, dict[str, Tensor]], tmp_path: Path
) -> None:
    from models.learning.reward_classifier import RewardClassifier

    export_weights(trained[0], tmp_path, trained[1].state_dict())
    with pytest.raises(UserError, match="task agent, not reward"):
        model_from_export(RewardClassifier, tmp_path)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(UserError, match="null_weight"):
        ProactiveAgent(null_weight=-1.0)


# Figures


def rows_of(*rows: tuple[float, int, AnswerKind, int]) -> dict[str, Tensor]:
    metric = AnswerLosses()
    for number, (loss, tokens, kind, needed) in enumerate(rows):
        columns = (torch.tensor([value]) for value in (tokens, int(kind), needed, number))
        metric.update(torch.tensor([loss]), *columns)
    return metric.rows()


def test_losses_are_means_over_tokens_without_probes() -> None:
    rows = rows_of(
        (6.0, 3, AnswerKind.TEXT, 1),
        (1.0, 1, AnswerKind.NULL, 0),
        (10.0, 2, AnswerKind.CONVERSATION, -1),
        (9.0, 1, AnswerKind.PROBE, 1),
    )
    assert {name: float(value) for name, value in answer_losses(rows).items()} == {
        "loss": pytest.approx(17 / 6),
        "loss_text": 2.0,
        "loss_null": 1.0,
    }
    assert answer_losses(rows_of((9.0, 1, AnswerKind.PROBE, 1))) == {}


def test_decision_metrics_equal_a_count_by_hand() -> None:
    probes = [(0.9, 1), (0.2, 0), (0.8, 0), (0.4, 1), (0.7, 1)]  # P(proposal), help needed
    rows = rows_of(*((-math.log(1 - p), 1, AnswerKind.PROBE, needed) for p, needed in probes))
    offers_N, needed_N = decisions(rows)
    assert offers_N.tolist() == pytest.approx([p for p, _ in probes])
    figures = {name: float(value) for name, value in proposal_metrics(offers_N, needed_N).items()}
    assert figures["precision"] == pytest.approx(2 / 3)
    assert figures["recall"] == pytest.approx(2 / 3)
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["auroc"] == pytest.approx(4 / 6)
    assert (figures["proposed"], figures["histories"]) == (pytest.approx(3 / 5), 5)
