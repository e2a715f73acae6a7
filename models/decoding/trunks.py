"""Trunks: the tokens of a trace that the prompts of several steps begin with."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.errors import UserError
from datamodules.prompting.segments import truncate

TraceIds = Sequence[Sequence[int]]  # token ids of the instructions and of each event


@dataclass(frozen=True)
class Trunk:
    """The tokens that the prompts of several steps of a trace begin with.

    Attributes:
        trace: Index of the trace.
        stream: Seeds the random numbers of its answers.
        token_ids: The tokens of the instructions and of the events up to the last step.
        ends: For each step, the number of these tokens that its answers attend to: those up to the step's event.
    """

    trace: int
    stream: int
    token_ids: list[int]
    ends: dict[int, int]


def trunks_of(
    traces: Sequence[TraceIds],
    generation_prompt: Sequence[int],
    wanted: Collection[tuple[int, int]] | None,
    limit: int,
    streams: Sequence[int] | None = None,
) -> list[Trunk]:
    """Return the trunks of the wanted steps, sorted so that similar trunks are neighbours.

    A prompt that is longer than `limit` loses its oldest events. Steps of a trace share a trunk if their prompts lose
    the same number of events.

    Args:
        traces, generation_prompt, wanted, streams: As in `models.decoding.generation.generate_answers`.
        limit: Maximum number of tokens of a prompt.

    Raises:
        UserError: The instructions leave no room for an answer.
    """
    if wanted is None:
        wanted = [(trace, step) for trace, segments in enumerate(traces) for step in range(1, len(segments))]
    steps_of: dict[int, list[int]] = {}
    for trace, step in sorted(set(wanted)):
        if not (0 <= trace < len(traces) and 0 <= step < len(traces[trace])):
            raise ValueError(f"there is no step {step} of trace {trace}")
        steps_of.setdefault(trace, []).append(step)
    trunks = []
    for trace, trace_steps in steps_of.items():
        instructions, *events = traces[trace]
        shortest = len(instructions) + len(generation_prompt)
        if shortest > limit:
            raise UserError(
                f"max_length: instructions and generation prompt have {shortest} tokens, and {limit} are left beside "
                "the answer",
                "Raise max_length, or lower max_new_tokens.",
            )
        steps_by_dropped: dict[int, list[int]] = {}
        for step in trace_steps:
            too_old = max(step - limit, 0)  # events that cannot fit, because an event has at least one token
            dropped = too_old + truncate([instructions, *events[too_old:step], generation_prompt], limit)[1]
            steps_by_dropped.setdefault(dropped, []).append(step)
        for dropped, steps in steps_by_dropped.items():
            segments = [instructions, *events[dropped : steps[-1]]]
            lengths = np.cumsum([len(segment) for segment in segments])
            token_ids = [token for segment in segments for token in segment]
            stream = trace if streams is None else streams[trace]
            trunks.append(Trunk(trace, stream, token_ids, {step: int(lengths[step - dropped]) for step in steps}))
    # Batches of similar trunks need the least padding.
    return sorted(trunks, key=lambda trunk: (len(trunk.ends), len(trunk.token_ids)))
