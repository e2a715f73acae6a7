"""A live session with the default small models: time per event, and memory over eight simulated hours.

    python -m proactive.fit && python -m proactive.fit --config agent/tiny
    python benchmarks/live.py

Events are those of the embedded traces, again and again. The first part asks the agent after each event, and lets the
gate judge each offer. The second part plays a working day, 100 times as fast, with the default pauses and limits, and a
user who accepts every offer.
"""

import asyncio
import gc
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from datamodules.corpus.records import Event
from datamodules.corpus.sources import load_corpus
from datamodules.corpus.traces import root_traces
from models.judging.answer_options import AnswerOptions
from models.judging.judges import RewardJudge
from models.judging.local_agent import LocalAgent
from models.judging.weights import load_weights
from models.learning.proactive_agent import ProactiveAgent
from models.learning.reward_classifier import RewardClassifier
from proactive.assistant.assistant import Assistant, SessionParts
from proactive.assistant.clock import Clock, ReplayClock
from proactive.assistant.deciding import Policy, Reply
from proactive.assistant.live_gate import Gate, GateOptions
from proactive.assistant.model_thread import ModelThread
from proactive.assistant.notices import Notices, Offer, OnAnswer
from proactive.assistant.observations import Cursor, Happened, Observation, Source
from proactive.assistant.session_log import SESSION_FILE, Entry, EventEntry
from proactive.assistant.session_summary import summary

BEGIN = 1_700_000_000.0
UNLIMITED = Policy(pause=0.0, per_hour=1000)
HOUR = 3600.0


class Day(Source):
    """Events of the embedded traces, `gap` seconds apart."""

    name = "day"

    def __init__(self, clock: Clock, events: int, gap: float) -> None:
        self.clock, self.events, self.gap = clock, events, gap

    def describe(self) -> dict[str, Any]:
        return {"source": "day", "events": self.events}

    async def observations(self, cursor: Cursor | None = None) -> AsyncGenerator[Observation, None]:
        for number, text in zip(range(self.events), _texts(), strict=False):
            at = BEGIN + self.gap * number
            await self.clock.reach(at)
            yield Happened(Event(time=f"{at:.0f}", event=text), at, {"next": number + 1})


def _texts() -> Iterator[str]:
    return cycle([event.event for trace in root_traces(load_corpus("embedded")) for event in trace.events])


class AcceptingUser(Notices):
    """Accepts every offer at once."""

    def __init__(self) -> None:
        self.answered: OnAnswer = lambda number, accepted: None

    def running(self, answered: OnAnswer) -> AbstractAsyncContextManager[object]:
        self.answered = answered
        return nullcontext()

    async def show(self, offer: Offer) -> None:
        self.answered(offer.number, True)

    async def end(self, offer: Offer, reply: Reply) -> None:
        return


def main(
    gate: Path = Path("runs/reward/0"),
    agent: Path = Path("runs/agent-tiny/0"),
    events: int = 100,
    hours: float = 8.0,
    gap: float = 60.0,
    speed: float = 100.0,
) -> dict[str, Any]:
    """Measure, and print the figures.

    Args:
        gate: The reward classifier.
        agent: The agent.
        events: Events of the first part; 0 skips it.
        hours: Simulated hours of the second part; 0 skips it.
        gap: Simulated seconds between its events.
        speed: How many times faster than real time it plays.
    """
    judge = RewardJudge(load_weights((RewardClassifier,), gate, "--gate"))
    proposer = LocalAgent(load_weights((ProactiveAgent,), agent, "--agent"), AnswerOptions())
    proposer.warm_up()

    def parts(clock: Clock, count: int, policy: Policy, **others: Any) -> SessionParts:
        source = Day(clock, count, gap)
        thread = ModelThread()
        ours = Gate(judge, 0.5, GateOptions(), source.name, thread)
        ours.warm_up()
        return SessionParts(
            source,
            clock,
            proposer,
            AcceptingUser(),
            policy,
            ours.verdict,
            0.5,
            ours.window,
            run_agent=thread.run,
            **others,
        )

    memory: dict[float, float] = {}

    def told(entry: Entry) -> None:
        hour = (entry.now - BEGIN) // HOUR
        if isinstance(entry, EventEntry) and hour not in memory:
            gc.collect()
            memory[hour] = _resident_mib()

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        if events:
            path = Path(folder, "first")
            begin = time.perf_counter()
            asyncio.run(Assistant(parts(ReplayClock(), events, UNLIMITED)).run(path / SESSION_FILE, {}))
            rate = events / (time.perf_counter() - begin)
            print(f"{events} events, the agent asked after each: {rate:.1f} events/s")
            figures |= {"events_per_second": rate, "milliseconds": _printed(path)}
        if hours:
            path = Path(folder, "second")
            day = parts(ReplayClock(speed), int(hours * HOUR / gap), Policy(), on_entry=told)
            asyncio.run(Assistant(day).run(path / SESSION_FILE, {}))
            print(f"{hours:g} simulated hours, {speed:g} times as fast: {summary(path)['events']}")
            _printed(path)
            print("  resident MiB, each hour: " + ", ".join(f"{size:.0f}" for size in memory.values()))
            figures["memory"] = memory
    return figures


def _printed(path: Path) -> dict[str, dict[str, float]]:
    """Print the milliseconds per event, and return them."""
    found = summary(path)["milliseconds"]
    for name, times in found.items():
        print(f"  {name}: {times['p50']:.1f} ms per event (p50), {times['p95']:.1f} ms (p95)", flush=True)
    return found


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    auto_cli(main)
