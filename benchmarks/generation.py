"""Generating the answers of whole traces at once, against `generate` of transformers: seconds, tokens, memory.

    python benchmarks/generation.py --root DIR

Each way runs in a process of its own, one after the other: the same causal language model from scratch (about 30
million parameters, 4,096 of them tokens of a BPE vocabulary trained on the rows), float32, greedy, the traces of DIR's
test_data, an answer after each event. No answer ends before its last token, whatever the way. `generate` is called with
its cache for each event, and, as a stronger peer, for all events of a trace at once, padded on the left. The ways give
the same tokens, which is checked by a digest.

With JSON, answers are held to the answer's schema and end when they are whole; how long the masks take is timed.
"""

import hashlib
import json
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tree_batches
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from datamodules.batching.reward_rows import RewardDataModule
from datamodules.corpus.records import Event
from datamodules.prompting.segments import SegmentTokenizer
from datamodules.prompting.templates import render_event
from models.decoding.answer_writer import GeneratedAnswer
from models.decoding.generation import generate_answers
from models.decoding.grammar import AnswerGrammar

BACKBONE = {**tree_batches.BACKBONE, "max_position_embeddings": 4096}
INSTRUCTIONS = "You watch what somebody does at a computer. Offer a task that helps, or nothing.\n"
GENERATION_PROMPT = "Answer:\n"
NO_END = -1  # a token that no network chooses


class TimedGrammar(AnswerGrammar):
    """Knows how long it took."""

    seconds = 0.0

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            self.seconds += time.perf_counter() - begin

    def allowed(self, *arguments: Any) -> Any:
        return self._timed(super().allowed, *arguments)

    def advance(self, *arguments: Any) -> Any:
        return self._timed(super().advance, *arguments)


class Setting:
    """The network, the traces and the generation prompt, the same in every process.

    Args:
        root: A directory in the published layout.
        traces: How many traces at most.
        events: How many events of each at most.
        backbone: A configuration of transformers with its model_type; the one described above if None.
        device: Where it computes.
        dtype: What it computes in.
    """

    def __init__(
        self,
        root: str,
        traces: int,
        events: int,
        backbone: dict[str, Any] | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        data = RewardDataModule(root=root, split="published", vocabulary_size=4096)
        data.setup("fit")
        self.tokenizer = data.tokenizer
        segments = SegmentTokenizer(self.tokenizer)
        paths = sorted(path for path in Path(root, "test_data").glob("*.json") if path.name != "splits.json")
        self.traces = []
        for path in paths[:traces]:
            rows = json.loads(path.read_text(encoding="utf-8"))[:events]
            seen = [render_event(data.template, Event(**row["observation"])) for row in rows]
            ids = segments.encode([(INSTRUCTIONS,), *seen])
            self.traces.append([segments.prefix + ids[0], *ids[1:]])
        self.generation_prompt = segments.encode([(GENERATION_PROMPT,)])[0]
        settings = {
            "vocab_size": len(self.tokenizer),
            **(backbone or BACKBONE),
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        torch.manual_seed(0)
        with torch.device(device):
            network = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        self.network = network.eval()
        self.tokens = tree_batches.Tokens(self.network)

    def grammar(self) -> "TimedGrammar":
        """What holds answers to JSON."""
        return TimedGrammar(self.tokenizer, self.tokenizer.eos_token_id)

    def prompts(self) -> list[list[list[int]]]:
        """Of each trace, the prompt after each event."""
        return [
            [[i for part in trace[: step + 1] for i in part] + self.generation_prompt for step in range(1, len(trace))]
            for trace in self.traces
        ]


def ours(
    setting: Setting,
    new: int,
    batch_size: int,
    grammar: AnswerGrammar | None = None,
    first: int | None = None,
    branched: bool | None = None,
) -> list[GeneratedAnswer]:
    """Answers of whole traces, or of the first ones."""
    end_id = NO_END if grammar is None else setting.tokenizer.eos_token_id
    options: dict[str, Any] = {"end_id": end_id, "max_new_tokens": new, "batch_size": batch_size, "grammar": grammar}
    options["branched"] = branched
    answers = generate_answers(setting.network, setting.traces[:first], setting.generation_prompt, **options)
    return sorted(answers, key=lambda answer: (answer.trace, answer.step))


def plain(
    setting: Setting,
    new: int,
    at_once: Literal["one", "trace", "all"] = "one",
    first: int | None = None,
    events: int | None = None,
) -> list[list[int]]:
    """Answers of `generate`, called for each event, for all of a trace, or once.

    Args:
        setting: What is asked.
        new: Tokens of each answer.
        at_once: What a call answers.
        first: How many traces; all if None.
        events: How many events of each; all if None.
    """
    answers = []
    asked = [prompts[:events] for prompts in setting.prompts()[:first]]
    each = [prompt for prompts in asked for prompt in prompts]
    for batch in {"one": [[prompt] for prompt in each], "trace": asked, "all": [each]}[at_once]:
        length = max(map(len, batch))
        device = setting.network.device
        given = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in batch], device=device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
        output = setting.network.generate(given, attention_mask=mask, max_new_tokens=new, do_sample=False)
        answers += output[:, length:].tolist()
    return answers


def measure(way: str, root: str, traces: int, events: int, new: int) -> dict[str, Any]:
    """Run one way and take its figures."""
    setting = Setting(root, traces, events)
    grammar = setting.grammar() if "JSON" in way else None
    setting.network.generate(torch.tensor([[1, 2]]), max_new_tokens=2)  # imports what it needs when first called
    setting.tokens.count = 0
    begin = time.perf_counter()
    if way.startswith("generate"):
        answers = plain(setting, new, "trace" if "trace" in way else "one")
    else:
        answers = [answer.token_ids for answer in ours(setting, new, int(way.split()[0]), grammar)]
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "tokens": setting.tokens.count,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "answers": len(answers),
        "new_tokens": sum(map(len, answers)),
        "masks": grammar.seconds / seconds if grammar else 0.0,
        "digest": hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:8],
    }


WAYS = [
    "12 traces side by side",
    "4 traces side by side",
    "1 trace at a time",
    "4 traces side by side, JSON",
    "generate, each event",
    "generate, all events of a trace",
]


def main(root: str, traces: int = 12, events: int = 1000, new_tokens: int = 64, only: str = "") -> None:
    """Run every way and print the table.

    Args:
        root: A directory in the published layout.
        traces: How many traces at most.
        events: How many events of each at most.
        new_tokens: Tokens of each answer.
        only: Only the ways whose name contains this.
    """
    found = {}
    for way in WAYS:
        if only in way:
            Console(stderr=True).print(f"{way} ...")
            found[way] = tree_batches.in_a_process(
                f"measure(*{(way, str(Path(root).resolve()), traces, events, new_tokens)!r})", "generation"
            )
    slow = found.get("generate, each event", {}).get("seconds")
    table = Table(title=f"{torch.get_num_threads()} threads, {new_tokens} new tokens")
    for title in ("way", "seconds", "over each event", "answers", "new tokens", "tokens given", "GiB", "masks", "same"):
        table.add_column(title, justify="left" if title == "way" else "right")
    for way, figures in found.items():
        ratio = f"{slow / figures['seconds']:.2f}" if slow else ""
        counts = (f"{figures[name]:,}" for name in ("answers", "new_tokens", "tokens"))
        shown = (f"{figures['peak_gib']:.2f}", f"{figures['masks']:.1%}", figures["digest"])
        table.add_row(way, f"{figures['seconds']:.1f}", ratio, *counts, *shown)
    Console(width=120).print(table)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    auto_cli(main, as_positional=False)
