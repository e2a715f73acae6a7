"""What a run states about itself: start and duration over all of its parts, device, how to compare it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from callbacks.run_facts import RunFacts

MODULE: Any = None  # no fact depends on the model


def trainer(state: str, ranks: int = 1) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(state=SimpleNamespace(fn=state), strategy=strategy, world_size=ranks)


def test_a_resumed_run_keeps_its_start_and_adds_its_time() -> None:
    facts = RunFacts(Path("runs", "reward", "0"))
    saved = {"run_time": {"started": "2026-01-02T03:04:05+00:00", "seconds": 50.0}}
    facts.on_load_checkpoint(trainer("fit"), MODULE, saved)
    facts.on_fit_start(trainer("fit", ranks=2), MODULE)
    checkpoint: dict[str, Any] = {}
    facts.on_save_checkpoint(trainer("fit"), MODULE, checkpoint)
    facts.on_fit_end(trainer("fit"), MODULE)
    record = facts.record()
    assert record["started"] == checkpoint["run_time"]["started"] == "2026-01-02T03:04:05+00:00"
    assert checkpoint["run_time"]["seconds"] > 50
    assert record["seconds"] >= 50
    assert record["device"].startswith("2 x CPU")
    facts.on_load_checkpoint(trainer("test"), MODULE, {"run_time": {"started": "the best weights'", "seconds": 1.0}})
    assert facts.record() == record


def test_a_run_is_compared_with_those_beside_it_and_a_fold_with_other_cross_validations(tmp_path: Path) -> None:
    alone = RunFacts(tmp_path / "a run" / "3").record()
    assert (alone["compare"], alone["pooled"]) == (f"python -m proactive.compare '{tmp_path}/a run'/*", None)
    (tmp_path / "cross" / "0").mkdir(parents=True)
    (tmp_path / "cross" / "0" / "folds.yaml").touch()
    fold = RunFacts(tmp_path / "cross" / "0" / "fold-1" / "0").record()
    assert (fold["compare"], fold["pooled"]) == (f"python -m proactive.compare {tmp_path}/cross/*", "../../report.html")
