"""Training in chat format: trees give the losses of rows, and what is trained is asked in the same format."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.batching.answer_rows import AgentDataModule
from datamodules.corpus.records import Event
from datamodules.corpus.traces import Pair, Trace
from models.judging.answer_options import AnswerOptions
from models.judging.local_agent import LocalAgent
from models.judging.scorer import Scorer
from models.judging.weights import Weights
from models.learning.proactive_agent import ProactiveAgent
from tests.models.reporting.test_chat_card import backbone
from tests.models.small import fit, small_classifier, small_data, small_trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return backbone(tmp_path_factory.mktemp("base"), "Mistral", "marked once")


def epoch_losses(model: Any, data: Any) -> list[float]:
    losses = []
    for layout in ("tree", "rows"):
        data.layout, data._layout = layout, None
        total = torch.zeros(())
        for step in data.train_dataloader():
            total = total + sum(model.loss(batch).detach() for batch in step)
        losses.append(float(total))
    return losses


@pytest.mark.parametrize("task", ["reward", "agent"])
def test_trees_of_chats_give_the_losses_of_rows(root: Path, base: str, task: str) -> None:
    options: dict[str, Any] = {"tokenizer": base, "max_length": 400, "token_budget": 800, "layout": "tree"}
    if task == "reward":
        model: Any = small_classifier(backbone=base, dropout=0.0)
        data: Any = small_data(root, **options)
    else:
        model = ProactiveAgent(backbone=base, dropout=0.0, sampled_answers=0)
        data = AgentDataModule(root=str(root), folds=3, batch_size=8, cache=False, **options)
    small_trainer(max_epochs=-1, max_steps=1, limit_val_batches=0).fit(model, data)
    model.eval()
    tree, rows = epoch_losses(model, data)
    assert data.chat is not None
    assert tree == pytest.approx(rows, rel=1e-5)


def test_a_scorer_gives_what_the_test_gives(root: Path, base: str) -> None:
    model, data = small_classifier(backbone=base), small_data(root, tokenizer=base, max_length=400)
    trainer = fit(model, data)
    trainer.test(model, data, verbose=False)
    scorer = Scorer(Weights(model, data.state_dict(), "here"), torch.device("cpu"))
    rows = [data.split.test[place] for place in model.test_rows["row"].tolist()]
    found = scorer.score([Pair(row.history, row.proposal) for row in rows])
    assert found == pytest.approx(model.test_rows["calibrated"].tolist(), abs=1e-5)


def test_an_agent_answers_whole_traces_and_single_events_alike(root: Path, base: str) -> None:
    """Under the grammar, which lets an answer begin with the white space that the chat template writes before it."""
    model = ProactiveAgent(backbone=base, learning_rate=1e-2, sampled_answers=2)
    data = AgentDataModule(root=str(root), folds=3, batch_size=8, cache=False, tokenizer=base, max_length=400)
    small_trainer(max_epochs=-1, max_steps=20, limit_val_batches=0).fit(model, data)
    assert data.lead == " "
    agent = LocalAgent(Weights(model, data.state_dict(), "here"), AnswerOptions(max_new_tokens=40))
    events = [Event(time=str(number), event=f"The user opens file {number}.") for number in range(4)]
    trace = Trace("one", tuple(events), (False,) * len(events))

    async def one_by_one() -> list[Any]:
        session = agent.session("one")
        return [await session.observe(event) for event in events]

    whole = asyncio.run(agent.answer([trace]))["one"]
    assert whole == asyncio.run(one_by_one())
    assert all(candidate.parsed for candidates in whole for candidate in candidates)
