"""Scoring one proposal after a history that grows: a Scorer that keeps its cache, against reading each whole row.

    python benchmarks/scoring.py

The model is that of `configs/reward/tiny.yaml`, which the default run trains, with random weights and the tokenizer of
the embedded data. After each event of a simulated history one proposal is scored. The peer is transformers: the same
network reads the whole row each time, which is cut as in training. Both give the same probabilities, which is checked.

    python benchmarks/scoring.py --sessions 32 --events 25

Sessions take turns, as in a simulation with a trained judge: with one cache for all, with a cache per session, and
with the next verdicts of all sessions in one batch.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from datamodules.batching.reward_rows import RewardDataModule
from datamodules.corpus.records import Event
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.traces import Pair, root_traces
from models.judging.scorer import Scorer
from models.judging.weights import Weights
from models.learning.reward_classifier import RewardClassifier
from models.networks.building import build_network

CONFIG = Path(__file__).parents[1] / "configs" / "reward" / "tiny.yaml"
PROPOSAL = "Offer to run the tests and to show the first one that fails."
SHOWN = 50  # events between lines of the table


def setting(max_length: int) -> Scorer:
    """The default model, with random weights."""
    options = yaml.safe_load(CONFIG.read_text())
    data = RewardDataModule(max_length=max_length, token_budget=max(2048, max_length), cache=False)
    data.setup("fit")
    torch.manual_seed(0)
    model = RewardClassifier(scratch=options["model"]["scratch"])
    model.network = build_network(model.network_options, data.tokenizer)
    return Scorer(Weights(model, data.state_dict(), "random"), torch.device("cpu"))


def history_of(events: int) -> list[Event]:
    """Events of simulated sessions, one session after the other."""
    every = [event for trace in root_traces(load_corpus("embedded")) for event in trace.events]
    return [every[number % len(every)] for number in range(events)]


def timed(score: Callable[[Pair], float], history: list[Event]) -> tuple[list[float], list[float]]:
    """Seconds, and probabilities, after each event."""
    seconds, found = [], []
    for number in range(1, len(history) + 1):
        pair = Pair(tuple(history[:number]), PROPOSAL)
        begin = time.perf_counter()
        found.append(score(pair))
        seconds.append(time.perf_counter() - begin)
    return seconds, found


def measure(events: int, max_length: int) -> dict[str, Any]:
    """Seconds of both ways, with the greatest difference of their probabilities."""
    scorer, history = setting(max_length), history_of(events)
    network = scorer.weights.model.network
    assert network is not None
    scorer.score([Pair(tuple(history[:1]), PROPOSAL)])  # tries the network, once

    @torch.inference_mode()
    def anew(pair: Pair) -> float:
        ids = torch.tensor([scorer.row_of(pair).tolist()])
        return float(network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double().softmax(-1)[1])

    kept, found = timed(lambda pair: scorer.score([pair])[0], history)
    whole, expected = timed(anew, history)
    tokens = [len(scorer.row_of(Pair(tuple(history[:number]), PROPOSAL))) for number in range(1, events + 1)]
    difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    return {"tokens": tokens, "scorer": kept, "anew": whole, "difference": difference}


def measure_turns(events: int, sessions: int, max_length: int) -> None:
    """Print the milliseconds per verdict of sessions that take turns.

    Args:
        events: Events per session.
        sessions: Number of sessions.
        max_length: Maximum number of tokens of a row.
    """
    every = history_of(events * sessions)
    histories = [tuple(every[number::sessions]) for number in range(sessions)]
    turns = [[Pair(history[:number], PROPOSAL) for history in histories] for number in range(1, events + 1)]

    def in_turn(scorer: Scorer, names: Sequence[str]) -> list[float]:
        return [scorer.score([pair], name)[0] for turn in turns for pair, name in zip(turn, names, strict=True)]

    ways: dict[str, Callable[[Scorer], list[float]]] = {
        "one cache": lambda scorer: in_turn(scorer, [""] * sessions),
        "a cache per session": lambda scorer: in_turn(scorer, [str(number) for number in range(sessions)]),
        "one batch per turn": lambda scorer: [score for turn in turns for score in scorer.score(turn)],
    }
    found = []
    for way, score in ways.items():
        scorer = setting(max_length)
        scorer.score([Pair(histories[0][:1], PROPOSAL)])  # self-checks
        begin = time.perf_counter()
        found.append(score(scorer))
        seconds = time.perf_counter() - begin
        print(f"{way}: {1000 * seconds / (events * sessions):.1f} ms per verdict")
    difference = max(max(abs(a - b) for a, b in zip(found[0], other, strict=True)) for other in found[1:])
    print(f"probabilities differ by {difference:.0e} at most")


def main(events: int = 200, max_lengths: list[int] | None = None, sessions: int = 1) -> None:
    """Measure and print a table for each greatest length.

    Args:
        events: Events of a history.
        max_lengths: Tokens of a row, at most: the default of 1,024, and a length that holds the whole history.
        sessions: If more than one, so many sessions take turns instead.
    """
    if sessions > 1:
        return measure_turns(events, sessions, (max_lengths or [1024])[0])
    for max_length in max_lengths or [1024, 4096]:
        found = measure(events, max_length)
        table = Table(title=f"data.max_length {max_length}: milliseconds to score one proposal after the next event")
        for title in ("events", "tokens", "Scorer", "whole row"):
            table.add_column(title, justify="right")
        for end in range(SHOWN, events + 1, SHOWN):
            part = slice(end - SHOWN, end)
            cells = (f"{1000 * statistics.median(found[name][part]):.1f}" for name in ("scorer", "anew"))
            table.add_row(f"{end - SHOWN + 1} to {end}", str(found["tokens"][end - 1]), *cells)
        ratio = sum(found["anew"]) / sum(found["scorer"])
        table.add_row("all, seconds", "", f"{sum(found['scorer']):.2f}", f"{sum(found['anew']):.2f}")
        Console(width=100).print(table)
        print(f"{ratio:.1f} times as fast over the session; probabilities differ by {found['difference']:.0e} at most")


if __name__ == "__main__":
    auto_cli(main)
