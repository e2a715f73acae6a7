"""Exports of a small agent and a small reward classifier, for tests of simulations."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from datamodules.batching.answer_rows import AgentDataModule
from datamodules.corpus.answers import Answer, write_answer
from models.judging.weights import Weights
from models.learning.calibration import Calibration
from models.learning.proactive_agent import ProactiveAgent
from models.learning.saved_models import export_weights
from models.networks.building import build_network
from models.networks.network_options import NetworkOptions
from tests.helpers import small_root
from tests.models.judging.test_local_agent import weights_of
from tests.models.small import DECODERS, small_classifier, small_data

ANSWERS = ("Help 1", "Help 2", "Help 3", None)
STEPS = 80  # until most answers of a small agent end
GENERATION_PROMPT = "Answer: " * 6
CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}" + GENERATION_PROMPT
CHAT_ANSWER = '{"purpose": "", "thoughts": "", "proposal": "Help with it.", "response": ""}'
# It attends to fewer tokens than the generation prompt has, so that a chat before it does not matter.
NEAR_SIGHTED = {"model_type": "mistral", **DECODERS["mistral"], "hidden_size": 32, "sliding_window": 16}


def export_agent(folder: Path) -> Path:
    """An agent that learned short answers, and draws them at random."""
    weights = weights_of(0)
    data = AgentDataModule.from_state(weights.state)
    prompt = [*data.segments(())[0], *data.generation_prompt()]
    answers = [_token_ids(data, write_answer(Answer(proposal=one))) for one in ANSWERS]
    _teach(weights, (([*prompt], answers[step % len(answers)]) for step in range(STEPS)))
    export_weights(weights.model, folder, weights.state)
    return folder


def export_chat_agent(folder: Path) -> Path:
    """An agent with a chat template that learned to give `CHAT_ANSWER` to any chat."""
    weights = weights_of(0, NEAR_SIGHTED)
    data = AgentDataModule.from_state(weights.state)
    answer, generation_prompt = (
        _token_ids(data, CHAT_ANSWER),
        data.tokenizer(GENERATION_PROMPT, add_special_tokens=False)["input_ids"],
    )
    _teach(weights, ((generation_prompt, answer) for _ in range(4 * STEPS)))
    export_weights(weights.model, folder, weights.state)
    data.tokenizer.chat_template = CHAT_TEMPLATE
    data.tokenizer.save_pretrained(folder)
    return folder


def _token_ids(data: AgentDataModule, answer: str) -> list[int]:
    return [*data.tokenizer(answer, add_special_tokens=False)["input_ids"], data.tokenizer.eos_token_id]


def _teach(weights: Weights[ProactiveAgent], examples: Iterable[tuple[list[int], list[int]]]) -> None:
    """Train on pairs of a prompt and its answer."""
    network = weights.model.network
    assert network is not None
    optimizer = torch.optim.AdamW(network.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    for prompt, answer in examples:
        labels = torch.tensor([[-100] * len(prompt) + answer])
        network(input_ids=torch.tensor([[*prompt, *answer]]), labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def export_judge(folder: Path, seed: int = 0) -> Path:
    """A reward classifier whose verdicts depend on what it reads."""
    data = small_data(small_root(folder.parent / "rows"), layout="auto", token_budget=512, max_length=500)
    data.setup("fit")
    torch.manual_seed(seed)
    model = small_classifier(pooling="auto")
    model.network = build_network(NetworkOptions("classifier", scratch=model.hparams["scratch"]), data.tokenizer)
    for parameter in model.network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    model.calibration = Calibration(1.7, 0.4, 10, 10)
    export_weights(model, folder, data.state_dict())
    return folder
