"""Work items that are done concurrently: each once, a bounded number at a time, until too many fail."""

import asyncio
from typing import Any

import pytest

from datamodules.errors import UserError
from models.judging.budget import LimitReachedError
from proactive.simulation.concurrent_work import Limits, StoppedError, run_all
from proactive.simulation.scene_writing import SceneDraft
from proactive.simulation.simulation_log import SimulationLog

ITEMS = [SceneDraft(str(number), "", "", "") for number in range(1000)]


def test_each_item_is_done_once_by_a_bounded_number_of_tasks() -> None:
    log, done, said = SimulationLog(), [], []
    tasks = []

    async def do(item: SceneDraft) -> dict[str, Any]:
        tasks.append(len(asyncio.all_tasks()))
        await asyncio.sleep(0)
        done.append(item.name)
        return {"end": "done"}

    asyncio.run(run_all(ITEMS, do, "items", log, Limits(8, 0), said.append))
    assert sorted(done, key=int) == [item.name for item in ITEMS]
    assert max(tasks) == 8 + 1  # and the caller
    assert all(log.outcome(item) for item in ITEMS)
    assert len(said) == 1000
    asyncio.run(run_all(ITEMS, do, "items", log, Limits(8, 0), said.append))
    assert len(done) == 1000
    assert said[1000:] == ["1000 of 1000 items have ended before"]


@pytest.mark.parametrize("failures", [0, 3])
def test_refused_items_are_not_ended_and_too_many_stop_the_others(failures: int) -> None:
    log, asked = SimulationLog(), []

    async def do(item: SceneDraft) -> dict[str, Any]:
        asked.append(item)
        raise UserError("no", "help")

    with pytest.raises(StoppedError, match=f"more than {failures} items failed, the last one: stopped: no"):
        asyncio.run(run_all(ITEMS, do, "items", log, Limits(1, failures), lambda text: None))
    assert len(asked) == failures + 1
    assert not any(log.outcome(item) for item in asked)


def test_a_reached_limit_lets_items_that_are_being_done_end_and_begins_no_other() -> None:
    log, begun = SimulationLog(), []

    async def do(item: SceneDraft) -> dict[str, Any]:
        begun.append(item)
        await asyncio.sleep(0)
        if item is ITEMS[0]:
            raise LimitReachedError("enough", "help")
        return {"end": "done"}

    with pytest.raises(StoppedError, match="enough"):
        asyncio.run(run_all(ITEMS, do, "items", log, Limits(4, 0), lambda text: None))
    assert begun == ITEMS[:4]
    assert [log.outcome(item) is not None for item in begun] == [False, True, True, True]
