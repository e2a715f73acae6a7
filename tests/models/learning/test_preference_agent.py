"""PreferenceAgent: losses and gradients beside TRL's, the reference, training, checkpoints."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from callbacks.checkpoint_io import SafeCheckpointIO
from datamodules.batching.answer_rows import AnswerKind
from datamodules.batching.preference_rows import PreferenceDataModule
from datamodules.errors import UserError
from models.learning.checkpoint_files import load_trained
from models.learning.preference_agent import PreferenceAgent
from models.learning.preference_losses import dpo_losses, kto_losses, preference_metrics
from models.learning.proactive_agent import ProactiveAgent
from models.learning.saved_models import export_weights
from models.online.agent_classes import AGENTS
from tests.helpers import small_root
from tests.models.networks.test_tree_reading import Result, assert_same, result_of
from tests.models.small import DECODERS, small_trainer

PAIRS = 6
LAYOUTS = (("rows", {"micro_batch_size": 2}), ("tree", {"token_budget": 600}), ("tree", {"token_budget": 9000}))


@pytest.fixture(scope="module")
def pairs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root(tmp_path_factory.mktemp("root"), scenes=12, rows_per_scene=20)


def small_data(root: Path, **options: Any) -> PreferenceDataModule:
    defaults: dict[str, Any] = {
        "root": str(root),
        "folds": 3,
        "vocabulary_size": 400,
        "batch_size": PAIRS,
        "scenes_per_step": None,
        "max_length": 400,
        "token_budget": 1200,
        "cache": False,
    }
    return PreferenceDataModule(**{**defaults, **options})


def small_agent(**options: Any) -> PreferenceAgent:
    scratch = {"model_type": "llama", **DECODERS["llama"]}
    defaults = {"scratch": scratch, "learning_rate": 1e-2, "sampled_answers": 0, "dropout": 0.0}
    return PreferenceAgent(**{**defaults, **options})


def fitted(
    root: Path, *callbacks: Any, epochs: int = 2, **options: Any
) -> tuple[PreferenceAgent, Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = small_agent(**options)
    data = small_data(root, objective=options.get("objective", "dpo"))
    trainer = small_trainer(max_epochs=epochs, num_sanity_val_steps=0, plugins=[SafeCheckpointIO(PreferenceAgent)])
    trainer.fit(model, data)
    return model, trainer, dict(trainer.callback_metrics)


class Case:
    """A step of a small agent that has left its reference, in any layout, beside TRL's trainer on the same rows."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.model, trainer, _ = fitted(root, epochs=1, learning_rate=0.0, **options)
        self.data = trainer.datamodule
        self.model.log = lambda *arguments, **options: None  # type: ignore[method-assign, assignment]
        assert self.model.network is not None
        self.before = copy.deepcopy(self.model.network)
        with torch.no_grad():
            for number, weight in enumerate(self.model.network.parameters()):
                torch.manual_seed(number)
                weight += 0.02 * torch.randn_like(weight)
        self.model.eval()

    def step(self, layout: str, **sizes: int) -> Result:
        """Loss and gradients of the first step."""
        self.data.layout = layout  # type: ignore[assignment]
        for name, value in sizes.items():
            setattr(self.data, name, value)
        self.data._layout = None
        micro_batches = next(iter(self.data.train_dataloader()))
        assert len(micro_batches) > 1 or sizes.get("token_budget", 0) > 2000
        self.model.prepare_step(micro_batches)
        return result_of(self.model, micro_batches)

    def rows(self) -> list[tuple[int, int]]:
        """The rows of each group of the first step."""
        return [tuple(self.data.groups("train").rows[group]) for group in self.data._train_sampler().steps()[0]]

    def parts(self, row: int) -> tuple[list[int], list[int]]:
        """Token ids before the answer of a row, and of the answer."""
        encoded = self.data.encoded["train"]
        assert encoded.answers is not None
        ids, start = list(encoded.input_ids[row]), int(encoded.answers[row][0])
        return ids[:start], ids[start:]


def trl_result(case: Case, trainer_class: Any, config: Any, examples: list[dict[str, Any]]) -> Result:
    """The loss and gradients of TRL's trainer on one batch."""

    class Trainer(trainer_class):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

    trainer = Trainer(
        model=copy.deepcopy(case.model.network),
        ref_model=copy.deepcopy(case.before),
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=case.data.tokenizer,
    )
    trainer.model.eval()
    inputs = trainer.data_collator(examples)
    loss = trainer._compute_loss(trainer.model, inputs, False)
    loss.backward()
    gradients = {f"network.{name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return Result(float(loss.detach()), gradients, {name: float(g.norm()) for name, g in gradients.items()})


def config_of(kind: Any, folder: Path, **options: Any) -> Any:
    given = {"per_device_train_batch_size": PAIRS, "report_to": "none", "use_cpu": True, "bf16": False}
    return kind(output_dir=str(folder), max_length=None, gradient_checkpointing=False, **given, **options)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_equals_trl_in_rows_and_trees(pairs_root: Path, tmp_path: Path, label_smoothing: float) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra bench)")
    case = Case(pairs_root, beta=0.3, label_smoothing=label_smoothing)
    examples = []
    for chosen, rejected in case.rows():
        (before, answer), (same, other) = case.parts(chosen), case.parts(rejected)
        assert before == same
        examples.append({"prompt_ids": before, "chosen_ids": answer, "rejected_ids": other})
    # TRL smooths the labels of its loss `exo_pair` and `robust` alone; the mixture of both signs is our own.
    if label_smoothing:
        signs = [(1 - label_smoothing, examples)]
        swapped = [{**one, "chosen_ids": one["rejected_ids"], "rejected_ids": one["chosen_ids"]} for one in examples]
        signs.append((label_smoothing, swapped))
    else:
        signs = [(1.0, examples)]
    expected = Result(0.0, {}, {})
    for share, given in signs:
        found = trl_result(case, trl.DPOTrainer, config_of(trl.DPOConfig, tmp_path, beta=0.3), given)
        expected.loss += share * found.loss
        for name, gradient in found.gradients.items():
            expected.gradients[name] = expected.gradients.get(name, 0) + share * gradient
            expected.parts[name] = expected.parts.get(name, 0.0) + float(gradient.norm())
    assert expected.loss != pytest.approx(math.log(2), abs=1e-3)
    for layout, sizes in (
        ("rows", {"micro_batch_size": 2}),
        ("tree", {"token_budget": 600}),
        ("tree", {"token_budget": 9000}),
    ):
        assert_same(case.step(layout, **sizes), expected, expected.parts)


def test_supervised_term_is_the_mean_loss_per_token_of_accepted_answers(pairs_root: Path) -> None:
    plain, both = Case(pairs_root, beta=0.3), Case(pairs_root, beta=0.3, supervised_weight=0.5)
    model = both.model
    losses = []
    for chosen, _ in both.rows():
        before, answer = both.parts(chosen)
        ids = torch.tensor([before + answer])
        assert model.network is not None
        with torch.no_grad():
            log_p = model.network(input_ids=ids).logits[0].float().log_softmax(-1)
        places = range(len(before), ids.shape[1])
        losses.append(-sum(float(log_p[place - 1, ids[0, place]]) for place in places) / len(places))
    extra = both.step("tree", token_budget=600).loss - plain.step("tree", token_budget=600).loss
    assert extra == pytest.approx(0.5 * sum(losses) / len(losses), rel=1e-4)


def test_kto_equals_trl_in_rows_and_trees(pairs_root: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra bench)")
    case = Case(pairs_root, objective="kto", beta=0.3, rejected_weight=1.5)
    examples = []
    for judged, mismatched in case.rows():
        (before, answer), (_, other) = case.parts(judged), case.parts(mismatched)
        accepted = case.data.groups("train").examples[judged].kind != AnswerKind.REJECTED
        examples.append(
            {"prompt_ids": before, "completion_ids": answer, "KL_completion_ids": other, "label": bool(accepted)}
        )
    config = config_of(trl.KTOConfig, tmp_path, beta=0.3, undesirable_weight=1.5, train_sampling_strategy="sequential")
    expected = trl_result(case, trl.KTOTrainer, config, examples)
    for layout, sizes in (
        ("rows", {"micro_batch_size": 2}),
        ("tree", {"token_budget": 600}),
        ("tree", {"token_budget": 9000}),
    ):
        assert_same(case.step(layout, **sizes), expected, expected.parts)


def test_equal_log_ratios_lose_ln_2_and_one_half() -> None:
    ratio, accepted = torch.zeros(4), torch.tensor([True, False, True, False])
    assert torch.allclose(dpo_losses(ratio, ratio, 0.1), torch.full((4,), math.log(2)))
    assert torch.allclose(dpo_losses(ratio, ratio, 0.1, 0.3), torch.full((4,), math.log(2)))
    assert kto_losses(ratio, accepted, torch.tensor(0.0), 0.1, 2.0).tolist() == [0.5, 1.0, 0.5, 1.0]


def test_metrics_of_pairs_equal_values_computed_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    found = preference_metrics(chosen, rejected, 0.5, torch.tensor([0, 0, 1, 1]))
    assert float(found["preference_accuracy"]) == 0.5
    assert float(found["reward_margin"]) == pytest.approx(0.125)
    assert float(found["preference_accuracy_low"]) <= 0.5 <= float(found["preference_accuracy_high"])
    assert preference_metrics(chosen[:0], rejected[:0], 0.5) == {}


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_fit_separates_accepted_from_rejected_proposals(pairs_root: Path, objective: str) -> None:
    model, trainer, _ = fitted(pairs_root, epochs=4, objective=objective, learning_rate=3e-3)
    data = trainer.datamodule
    pairs = data.pairs("train")
    log_p = model._log_probability("train") - model.reference["train"]["log_probability"]
    margin = log_p[pairs[:, 0]] - log_p[pairs[:, 1]]
    assert float((margin > 0).double().mean()) > 0.65
    trainer.test(model, data, verbose=False)
    raw = model.test_metrics["raw"]
    assert raw["pairs"] == len(data.pairs("test"))
    assert raw["reward_margin"] == pytest.approx(raw["reward_chosen"] - raw["reward_rejected"])
    assert "f1" in raw


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_without_learning_the_loss_stays_and_nothing_diverges(pairs_root: Path, objective: str) -> None:
    model, trainer, logged = fitted(pairs_root, epochs=1, learning_rate=0.0, objective=objective)
    assert float(logged["train/loss"]) == pytest.approx(math.log(2) if objective == "dpo" else 0.5, abs=1e-6)
    assert float(logged["validation/preference_loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(logged["validation/reward_margin"]) == pytest.approx(0, abs=1e-5)
    if objective == "kto":
        assert float(logged["train/divergence"]) == pytest.approx(0, abs=1e-5)
    trainer.test(model, trainer.datamodule, verbose=False)
    raw, before = model.test_metrics["raw"], model.before_metrics
    assert set(raw) - set(before) == {name for name in raw if name.startswith("preference_accuracy")}
    assert before == pytest.approx({name: raw[name] for name in before}, abs=1e-6)


def test_a_checkpoint_keeps_the_reference_and_loads_as_an_agent(pairs_root: Path, tmp_path: Path) -> None:
    model, trainer, _ = fitted(pairs_root)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    again, state, _ = load_trained(AGENTS, path, "--agent.checkpoint")
    assert isinstance(again, PreferenceAgent)
    for stage, reference in model.reference.items():
        assert again.reference[stage]["rows"] == reference["rows"]
        assert torch.equal(again.reference[stage]["log_probability"], reference["log_probability"])
    export_weights(model, tmp_path / "export", trainer.datamodule.state_dict())
    exported, _, _ = load_trained(AGENTS, tmp_path / "export", "--agent.checkpoint")
    assert isinstance(exported, PreferenceAgent)
    assert PreferenceDataModule.from_state(state).generation_prompt() == trainer.datamodule.generation_prompt()
    with pytest.raises(UserError, match="is of task preference, not agent"):
        load_trained((ProactiveAgent,), path, "--agent.checkpoint")


def test_a_reference_of_other_rows_is_refused(pairs_root: Path) -> None:
    model = small_agent()
    model.reference = {"train": {"rows": "other", "log_probability": torch.zeros(1, dtype=torch.float64)}}
    trainer = small_trainer(num_sanity_val_steps=0, plugins=[SafeCheckpointIO(PreferenceAgent)])
    with pytest.raises(UserError, match="the checkpoint's reference is of other train rows"):
        trainer.fit(model, small_data(pairs_root))


def test_adapters_learn_from_pairs_on_a_frozen_base(pairs_root: Path, base: Path, tmp_path: Path) -> None:
    """The agent with its new adapter is the reference; a checkpoint contains the adapter and the reference."""
    torch.manual_seed(0)
    options = {"backbone": str(base), "scratch": None, "adapter": {"rank": 4, "alpha": 8, "dropout": 0.0}}
    still, model = (small_agent(**options, learning_rate=rate) for rate in (0.0, 1e-2))
    for one, expected in ((still, math.log(2)), (model, None)):
        data = small_data(pairs_root, tokenizer=str(base))
        trainer = small_trainer(num_sanity_val_steps=0, plugins=[SafeCheckpointIO(PreferenceAgent)])
        trainer.fit(one, data)
        if expected is not None:
            assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(expected, abs=1e-6)
    assert float(trainer.callback_metrics["validation/reward_margin"]) != 0
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again, _, _ = load_trained(AGENTS, tmp_path / "a.ckpt", "--agent.checkpoint")
    batch = next(iter(data.evaluation_loader("validation")))[0]
    model.eval()
    again.eval()
    with torch.no_grad():
        assert torch.allclose(again.row_losses(batch), model.row_losses(batch), rtol=1e-5)
