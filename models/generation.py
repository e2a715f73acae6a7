"""Stand-in until the real one."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class GeneratedAnswer:
    trace: int
    step: int
    candidate: int
    token_ids: list[int]
    finished: bool


def generate_answers(
    network: Any,
    traces: Sequence[Sequence[Sequence[int]]],
    opening: Sequence[int],
    *,
    end_id: int,
    max_new_tokens: int,
    max_length: int | None = None,
    wanted: Collection[tuple[int, int]] | None = None,
) -> Iterator[GeneratedAnswer]:
    for trace, segments in enumerate(traces):
        for step in range(len(segments) - 1):
            if wanted is None or (trace, step) in wanted:
                ids = [*(t for s in segments[: step + 2] for t in s), *opening]
                out = network.generate(
                    torch.tensor([ids], device=network.device),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=network.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=end_id,
                )[0, len(ids) :].tolist()
                finished = end_id in out
                yield GeneratedAnswer(trace, step, 0, out[: out.index(end_id)] if finished else out, finished)
