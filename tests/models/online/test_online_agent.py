"""OnlineAgent: its loss, what it learns from rewards, and what it refuses."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.checkpoint_io import SafeCheckpointIO
from datamodules.batching.answer_rows import AgentDataModule, Example
from datamodules.batching.history_rows import HistoryDataModule
from datamodules.corpus.answers import Answer
from datamodules.errors import UserError
from models.learning.checkpoint_files import load_trained
from models.learning.proactive_agent import ProactiveAgent
from models.learning.saved_models import export_weights
from models.online import online_agent
from models.online.agent_classes import AGENTS
from models.online.online_agent import OnlineAgent, WrittenAnswer
from tests.helpers import small_root
from tests.models.networks.test_tree_reading import assert_same, result_of
from tests.models.small import DECODERS, small_trainer

OPTIONS: dict[str, Any] = {
    "folds": 3,
    "vocabulary_size": 400,
    "batch_size": 4,
    "scenes_per_step": None,
    "max_length": 400,
    "token_budget": 900,
    "cache": False,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root(tmp_path_factory.mktemp("root"), scenes=12, rows_per_scene=20)


@pytest.fixture(scope="module")
def export(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent after a few steps, which writes a null answer now and then."""
    torch.manual_seed(0)
    scratch = {"model_type": "llama", **DECODERS["llama"]}
    model = ProactiveAgent(scratch=scratch, learning_rate=1e-2, sampled_answers=0, null_weight=3.0)
    data = AgentDataModule(root=str(root), **{**OPTIONS, "batch_size": 16})
    small_trainer(max_epochs=12, num_sanity_val_steps=0, limit_val_batches=0).fit(model, data)
    folder = tmp_path_factory.mktemp("agent")
    export_weights(model, folder, data.state_dict())
    data.tokenizer.save_pretrained(folder)
    return folder


class RewardOf:
    """Rewards answers by a function, in place of a judge."""

    digest = "function"
    scenes: frozenset[str] = frozenset()
    histories: frozenset[int] = frozenset()

    def __init__(self, function: Callable[[Any], float]) -> None:
        self.function = function

    def rewards(self, histories: Sequence[Any], answers: Sequence[Any]) -> Tensor:
        return torch.tensor([self.function(answer) for answer in answers], dtype=torch.float64)


def silence(answer: Any) -> float:
    return float(answer is not None and answer.proposal is None)


@pytest.fixture
def rewarded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], float]], None]:
    def use(function: Callable[[Any], float]) -> None:
        monkeypatch.setattr(online_agent, "JudgeReward", lambda *arguments: RewardOf(function))

    return use


def fitted(root: Path, export: Path, steps: int, *callbacks: Any, **options: Any) -> tuple[OnlineAgent, Any]:
    torch.manual_seed(0)
    given = {"sampled_answers": 0, "dropout": 0.0, "learning_rate": 3e-3, "max_new_tokens": 24, **options}
    model = OnlineAgent("judge", backbone=str(export), **given)
    data = HistoryDataModule(root=str(root), tokenizer=str(export), max_new_tokens=24, **OPTIONS)
    trainer = small_trainer(
        *callbacks,
        max_steps=steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        plugins=[SafeCheckpointIO(OnlineAgent)],
    )
    trainer.fit(model, data)
    return model, trainer


def test_each_step_of_an_epoch_logs_all_values(root: Path, export: Path, rewarded: Any) -> None:
    rewarded(silence)
    logged: list[set[str]] = []

    class Logged(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            logged.append(set(trainer.callback_metrics))

    fitted(root, export, 2, Logged())
    names = ("loss", "learning_rate", "gradient_norm", "divergence", "reward", "offer_rate", "unreadable")
    assert logged == [{f"train/{name}" for name in (*names, "answer_tokens")}] * 2


def low_tokens(written: Sequence[WrittenAnswer]) -> Tensor:
    """The share of tokens below 200 in each answer."""
    return torch.tensor([sum(token < 200 for token in one.token_ids) / len(one.token_ids) for one in written])


@pytest.mark.parametrize("sign", [1, -1])
def test_answers_with_more_reward_become_more_likely(
    root: Path, export: Path, rewarded: Any, monkeypatch: pytest.MonkeyPatch, sign: int
) -> None:
    def rewards(self: OnlineAgent, judge: str, histories: Sequence[Any], written: Sequence[WrittenAnswer]) -> Tensor:
        return sign * low_tokens(written).double().view(len(histories), -1)

    rewarded(silence)
    monkeypatch.setattr(OnlineAgent, "_rewards", rewards)

    def mean(steps: int) -> float:
        model, trainer = fitted(root, export, steps, learning_rate=1e-2)
        examples = trainer.datamodule.rows("train")[:8]
        return float(low_tokens(model.write(examples, 8, 1.0, range(8))).mean())

    assert sign * mean(10) > sign * mean(0) + 0.1


def test_equal_rewards_and_no_step_leave_the_reference(root: Path, export: Path, rewarded: Any) -> None:
    rewarded(lambda answer: 0.5)
    model, trainer = fitted(root, export, 3, divergence_weight=0.0, weight_decay=0.0)
    assert model.network is not None
    reference = model._reference[0].state_dict()
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, reference[name]), name
    assert float(trainer.callback_metrics["train/divergence"]) == pytest.approx(0, abs=1e-4)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(0, abs=1e-4)


def micro_batches(model: OnlineAgent, data: Any, layout: str, budget: int) -> list[Any]:
    """The same written answers in a layout, with advantages that differ."""
    data.layout, data.token_budget = layout, budget
    examples: list[Example] = data.rows("train")[:3]
    written = model.write(examples, 4, 1.0, range(3))
    advantage = torch.linspace(-1, 1.5, 12)
    return model._micro_batches(examples, written, advantage, torch.full((12,), 1 / 12))


def test_the_loss_is_the_same_in_rows_and_trees_and_as_defined(root: Path, export: Path, rewarded: Any) -> None:
    rewarded(silence)
    model, trainer = fitted(root, export, 2, divergence_weight=0.5)
    data = trainer.datamodule
    assert model.network is not None
    with torch.no_grad():
        for number, weight in enumerate(model.network.parameters()):
            torch.manual_seed(number)
            weight += 0.02 * torch.randn_like(weight)
    rows = result_of(model.eval(), micro_batches(model, data, "rows", 900))
    for budget in (500, 9000):
        assert_same(result_of(model.eval(), micro_batches(model, data, "tree", budget)), rows, rows.parts)
    expected = 0.0
    examples = data.rows("train")[:3]
    for number, one in enumerate(model.write(examples, 4, 1.0, range(3))):
        model.eval()
        prompt = data.prompt(examples[number // 4].history)
        ids = torch.tensor([prompt + one.token_ids])
        networks = (model.network, model._reference[0])
        own, reference = (log_probabilities(network, ids, len(prompt)) for network in networks)
        divergence = (reference - own).exp() - (reference - own) - 1
        advantage = -1 + 2.5 * number / 11
        expected += float((-advantage * own + 0.5 * divergence).mean()) / 12
    assert rows.loss == pytest.approx(expected, rel=1e-4)


def log_probabilities(network: Any, ids: Tensor, start: int) -> Tensor:
    with torch.no_grad():
        log_p_TV = network(input_ids=ids).logits[0].float().log_softmax(-1)
    places = torch.arange(start, ids.shape[1])
    return log_p_TV[places - 1, ids[0, places]]


def test_samples_depend_on_history_and_step_alone(root: Path, export: Path, rewarded: Any) -> None:
    rewarded(silence)
    model, trainer = fitted(root, export, 0)
    examples = trainer.datamodule.rows("train")[:4]

    def texts(numbers: list[int]) -> list[list[WrittenAnswer]]:
        found = model.write([examples[n] for n in numbers], 2, 1.0, numbers)
        return [found[2 * place : 2 * place + 2] for place in range(len(numbers))]

    alone = {n: texts([n])[0] for n in range(4)}
    assert texts([3, 1, 0]) == [alone[3], alone[1], alone[0]]
    assert len({tuple(one.token_ids) for pair in alone.values() for one in pair}) > 2


def test_a_run_that_only_makes_offers_ends_and_says_so(
    root: Path, export: Path, rewarded: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rewarded(silence)
    monkeypatch.setattr(online_agent, "MAX_CONSTANT_STEPS", 2)
    offer = WrittenAnswer([5, 6, 7], Answer(proposal="A"))
    monkeypatch.setattr(OnlineAgent, "write", lambda self, examples, count, *rest: [offer] * len(examples) * count)
    _, trainer = fitted(root, export, 9)
    assert trainer.global_step == 2
    assert "the run ends: offers only in 2 steps in a row" in caplog.text


def test_validation_logs_both_judges_and_loads_as_an_agent(
    root: Path, export: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def judge(path: str, *arguments: Any) -> RewardOf:
        made = RewardOf(silence if path == "judge" else lambda answer: 0.25)
        made.digest = path
        return made

    monkeypatch.setattr(online_agent, "JudgeReward", judge)
    model, trainer = fitted(root, export, 1, held_out_judge="other")
    validating = small_trainer()
    validating.validate(model, trainer.datamodule, verbose=False)
    logged = validating.callback_metrics
    assert float(logged["validation/held_out_reward"]) == 0.25
    assert 0 <= float(logged["validation/reward"]) <= 1 - float(logged["validation/offer_rate"])
    assert 0 < float(logged["validation/p_null"]) < 1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again, _, _ = load_trained(AGENTS, tmp_path / "a.ckpt", "--agent.checkpoint")
    assert isinstance(again, OnlineAgent)
    assert again.judge_digests == {"judge": "judge", "held_out_judge": "other"}


def test_what_cannot_be_trained_online_is_refused(root: Path, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_agent, "JudgeReward", lambda *arguments: RewardOf(silence))
    with pytest.raises(UserError, match="it is the judge that rewards"):
        fitted(root, export, 1, held_out_judge="same")
    scratch = {"model_type": "llama", **DECODERS["llama"]}
    model = OnlineAgent("judge", scratch=scratch)
    with pytest.raises(UserError, match="online training needs a trained agent"):
        small_trainer(num_sanity_val_steps=0).fit(model, HistoryDataModule(root=str(root), **OPTIONS))
    with pytest.raises(UserError, match="online training needs histories"):
        HistoryDataModule(root=str(root), annotated=False, **OPTIONS)

    class Knows(RewardOf):
        scenes = frozenset({"all"})

    known = Knows(silence)
    data = HistoryDataModule(root=str(root), tokenizer=str(export), **OPTIONS)
    data.setup("fit")
    monkeypatch.setattr(online_agent, "JudgeReward", lambda *arguments: known)
    row = data.split.test[0]
    for scenes, histories in (({row.scene}, set()), (set(), {row.history_digest})):
        known.scenes, known.histories = frozenset(scenes), frozenset(histories)
        with pytest.raises(UserError, match=r"model\.judge: it was trained on scenes of the agent's test"):
            fitted(root, export, 1)


def test_a_resume_with_another_judge_is_refused(root: Path, export: Path, rewarded: Any) -> None:
    rewarded(silence)
    model, _ = fitted(root, export, 0)
    model.judge_digests = {"judge": "another"}
    with pytest.raises(UserError, match="it is another judge than that of the run so far"):
        model._load_judges()
