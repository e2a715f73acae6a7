"""Exports of a small agent and a small reward classifier, for tests of simulations."""

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
from tests.models.small import small_classifier, small_data

ANSWERS = ("Help 1", "Help 2", "Help 3", None)
STEPS = 80  # until most answers of a small agent end


def export_agent(folder: Path) -> Path:
    """An agent that learned short answers, and draws them at random."""
    weights = weights_of(0)
    _teach(weights)
    export_weights(weights.model, folder, weights.state)
    return folder


def _teach(weights: Weights[ProactiveAgent]) -> None:
    data, network = AgentDataModule.from_state(weights.state), weights.model.network
    assert network is not None
    prompt = [*data.segments(())[0], *data.opening()]
    end = data.tokenizer.eos_token_id
    answers = [[*data.tokenizer(write_answer(Answer(proposal=one)))["input_ids"], end] for one in ANSWERS]
    optimizer = torch.optim.AdamW(network.parameters(), 2e-2)
    for step in range(STEPS):
        answer = answers[step % len(answers)]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        network(input_ids=torch.tensor([[*prompt, *answer]]), labels=labels).loss.backward()
        optimizer.step()
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
