"""Trunks: the tokens of a trace that the prompts of several steps begin with."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.errors import UserError
from datamodules.prompting.segments import truncate

TraceIds = Sequence[Sequence[int]]  # token ids of the instructions and of each event


@dataclass(frozen=True)
class Trunk:
    """The tokens that several steps of a trace share.

    `end` maps each step to the number of trunk tokens that its answers attend to.
    """

    trace: int
    stream: int
    token_ids: list[int]
    end: dict[int, int]


def trunks_of(
    traces: Sequence[TraceIds],
    opening: Sequence[int],
    wanted: Collection[tuple[int, int]] | None,
    limit: int,
    streams: Sequence[int] | None = None,
) -> list[Trunk]:
    """Return the trunks of the wanted steps, sorted so that similar trunks are neighbours.

    Steps of a trace share a trunk if the same number of events is dropped from their histories.

    Args:
        traces: See `models.decoding.generation.generate_answers`.
        opening: The same.
        wanted: The same.
        limit: Maximum number of tokens of a prompt.
        streams: As `traces`.

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
        first, *events = traces[trace]
        if len(first) + len(opening) > limit:
            raise UserError(
                f"max_length: instructions and opening have {len(first) + len(opening)} tokens, and {limit} are left "
                "beside the answer",
                "Raise max_length, or lower max_new_tokens.",
            )
        by_dropped: dict[int, list[int]] = {}
        for step in trace_steps:
            older = max(step - limit, 0)  # these cannot fit: an event has at least one token
            dropped = older + truncate([first, *events[older:step], opening], limit)[1]
            by_dropped.setdefault(dropped, []).append(step)
        for dropped, steps in by_dropped.items():
            lengths = np.cumsum([len(first), *map(len, events[dropped : steps[-1]])])
            token_ids = [token for part in (first, *events[dropped : steps[-1]]) for token in part]
            stream = trace if streams is None else streams[trace]
            trunks.append(Trunk(trace, stream, token_ids, {step: int(lengths[step - dropped]) for step in steps}))
    # Batches of similar trunks need the least padding.
    return sorted(trunks, key=lambda trunk: (len(trunk.end), len(trunk.token_ids)))
