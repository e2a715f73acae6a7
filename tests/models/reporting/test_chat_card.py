"""The export of a model in chat format: its card's code gives the same probabilities, and the messages for a server."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from datamodules.batching.rows import RowsDataModule
from datamodules.corpus.sources import load_corpus
from datamodules.prompting.templates import DEFAULT_PROMPT, RewardTemplate, training_text
from models.judging.weights import load_weights
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from models.networks.configurations import quiet_transformers
from tests.datamodules.prompting.chat_styles import chat_tokenizer
from tests.models.reporting.test_model_card import (
    agent_data,
    assert_decides_alike,
    assert_judges_alike,
    exported,
    root_with_impostors,
    run_card,
)
from tests.models.small import FAMILIES, small_classifier, small_data

MODELS = pytest.mark.parametrize(
    ("style", "kind"), [("ChatML", "GPT-2"), ("Mistral", "marked once"), ("Phi 3", "marked always")]
)


def backbone(folder: Path, style: str, kind: str) -> str:
    """A language model with random weights, whose tokenizer has a chat template."""
    text = training_text(RewardTemplate.read(DEFAULT_PROMPT), load_corpus("embedded").train[:200])
    tokenizer = chat_tokenizer(style, kind, text)
    sizes = {**FAMILIES["llama"], "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    with quiet_transformers():
        config = transformers.AutoConfig.for_model("llama", **sizes, eos_token_id=tokenizer.eos_token_id)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def assert_messages_stand_for_rows(folder: Path, data: RowsDataModule, stage: Any = "test") -> None:
    """transformers' token ids of the card's messages, without special tokens in texts, are those of whole rows."""
    names = run_card(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    compared = 0
    for row in data.rows(stage):
        history = [event.model_dump() for event in row.history]
        is_reward = "probability" in names
        given = (history, row.proposal) if is_reward else (history,)
        part = "answer" if not is_reward else "no_proposal" if row.proposal is None else "proposal"
        ids = names["joined"](history, names["tokens"](part, proposal=row.proposal))
        ids = ids if is_reward else ids[:-1]
        asked = tokenizer.apply_chat_template(
            names["messages"](*given), add_generation_prompt=True, sanitize_control_tokens=True
        )
        if len(ids) == len(asked["input_ids"]):  # no event is dropped
            assert ids == asked["input_ids"]
            compared += 1
    assert compared > 5


@MODELS
def test_a_classifiers_card_gives_its_probabilities(tmp_path: Path, style: str, kind: str) -> None:
    base, root = backbone(tmp_path / "base", style, kind), root_with_impostors(tmp_path / "root")
    data = small_data(root, tokenizer=base, max_length=300)
    model = small_classifier(backbone=base)
    folder = exported(model, data, tmp_path)
    assert data.chat is not None
    assert_judges_alike(model, data, folder)
    assert_messages_stand_for_rows(folder, data)
    loaded = load_weights((RewardClassifier,), folder, "path")
    again = type(data).from_state(loaded.state)
    assert (again.chat, again.template, again.end) == (data.chat, data.template, data.end)


@MODELS
def test_an_agents_card_gives_its_decisions(tmp_path: Path, style: str, kind: str) -> None:
    base, root = backbone(tmp_path / "base", style, kind), root_with_impostors(tmp_path / "root")
    data = agent_data(root, tokenizer=base, max_length=400)
    model = ProactiveAgent(backbone=base, learning_rate=1e-2, sampled_answers=0)
    folder = exported(model, data, tmp_path, steps=20)
    assert data.chat is not None
    assert_decides_alike(model, data, folder)
    assert_messages_stand_for_rows(folder, data)
    stops = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert data.end_id in (stops if isinstance(stops, list) else [stops])
