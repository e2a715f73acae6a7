"""Two libraries that hold answers to a JSON schema: time to start, time a token, and whether answers are valid.

    pip install llguidance xgrammar
    python benchmarks/grammars.py

64 answers side by side, their tokens the greatest of random logits among those that the library allows, up to 64 each;
one thread. The tokenizers are byte-level BPE, trained on the Python files that are installed beside torch.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from datamodules.corpus.answers import ANSWER_SCHEMA, read_answer
from datamodules.prompting.tokenizers import train_tokenizer
from models.decoding.grammar import AnswerGrammar

ANSWERS, TOKENS = 64, 64


class Library(Protocol):
    """What is timed: made once for a tokenizer, then masks and tokens of all answers."""

    def __init__(self, tokenizer: Any) -> None: ...

    def allowed(self, live: list[int]) -> np.ndarray[Any, Any]: ...

    def advance(self, answer: int, token: int) -> bool: ...


class LLGuidance:
    """As `models.decoding.grammar` uses it."""

    def __init__(self, tokenizer: Any) -> None:
        self.width = len(tokenizer)
        self.grammar = AnswerGrammar(tokenizer, tokenizer.eos_token_id)
        self.matchers = [self.grammar.start() for _ in range(ANSWERS)]

    def allowed(self, live: list[int]) -> np.ndarray[Any, Any]:
        return self.grammar.allowed([self.matchers[answer] for answer in live], self.width).numpy()

    def advance(self, answer: int, token: int) -> bool:
        return self.grammar.advance(self.matchers[answer], token)


class XGrammar:
    """The same schema, style and masks."""

    def __init__(self, tokenizer: Any) -> None:
        import xgrammar

        self.width = len(tokenizer)
        self.fill = xgrammar.allocate_token_bitmask
        stop = [tokenizer.eos_token_id]
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=self.width, stop_token_ids=stop)
        compiled = xgrammar.GrammarCompiler(info).compile_json_schema(
            json.dumps(ANSWER_SCHEMA), any_whitespace=False, separators=(", ", ": ")
        )
        self.matchers = [xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True) for _ in range(ANSWERS)]

    def allowed(self, live: list[int]) -> np.ndarray[Any, Any]:
        bits = self.fill(len(live), self.width)
        for place, answer in enumerate(live):
            self.matchers[answer].fill_next_token_bitmask(bits, place)
        return np.unpackbits(bits.numpy().view(np.uint8), axis=1, count=self.width, bitorder="little").view(bool)

    def advance(self, answer: int, token: int) -> bool:
        assert self.matchers[answer].accept_token(token)
        return self.matchers[answer].is_terminated()


def measure(kind: type[Library], tokenizer: Any) -> dict[str, Any]:
    """Write random answers and take the figures."""
    begin = time.perf_counter()
    library = kind(tokenizer)
    started = time.perf_counter() - begin
    random = np.random.default_rng(0)
    written: list[list[int]] = [[] for _ in range(ANSWERS)]
    live, finished = list(range(ANSWERS)), []
    masks, tokens = [], []
    for _ in range(TOKENS):
        begin = time.perf_counter()
        allowed = library.allowed(live)
        middle = time.perf_counter()
        logits = random.standard_normal((ANSWERS, len(tokenizer)))[live]
        chosen = np.where(allowed, logits, -np.inf).argmax(1).tolist()
        last = time.perf_counter()
        done = [library.advance(answer, token) for answer, token in zip(live, chosen, strict=True)]
        masks.append((middle - begin) / len(live) * 1e6)
        tokens.append((time.perf_counter() - last) / len(live) * 1e6)
        for answer, token in zip(live, chosen, strict=True):
            written[answer].append(token)
        finished += [answer for answer, end in zip(live, done, strict=True) if end]
        live = [answer for answer, end in zip(live, done, strict=True) if not end]
    texts = [tokenizer.decode(written[answer]) for answer in finished]
    valid = sum(read_answer(text) is not None and "proposal" in json.loads(text) for text in texts)
    figures = {"start, ms": started * 1e3, "mask, µs a token": statistics.median(masks)}
    return figures | {"slowest mask": max(masks), "token, µs": statistics.median(tokens), "valid": (valid, len(texts))}


def main(vocabularies: list[int] = [4096, 128000], million_characters: int = 60) -> None:  # noqa: B006
    """Measure both libraries and print the table.

    Args:
        vocabularies: Sizes of the tokenizers.
        million_characters: How much text the tokenizers are trained on.
    """
    torch.set_num_threads(1)
    lines: list[str] = []
    size = 0
    for path in sorted(Path(torch.__file__).parents[1].rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines += text.splitlines()
        size += len(text)
        if size > million_characters * 10**6:
            break
    table = Table(title=f"{ANSWERS} answers side by side")
    for title in ("library", "vocabulary", "start, ms", "mask, µs a token", "slowest mask", "token, µs", "valid"):
        table.add_column(title, justify="left" if title == "library" else "right")
    for vocabulary in vocabularies:
        tokenizer = train_tokenizer(lines, vocabulary)
        for kind in (LLGuidance, XGrammar):
            figures = measure(kind, tokenizer)
            valid, total = figures.pop("valid")
            shown = [f"{figure:.1f}" for figure in figures.values()]
            table.add_row(kind.__name__, f"{len(tokenizer):,}", *shown, f"{valid} of {total}")
    Console(width=120).print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
