"""Benchmarks are scripts that no other code imports: each loads, and that of trees runs small."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

from datamodules.corpus.sources import load_corpus
from tests.helpers import ROOT, SMALL_BACKBONE, small_root

SCRIPTS = sorted(p for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text(encoding="utf-8"))


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_each_benchmark_can_be_imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))  # as where it is run as a script
    text = loaded(path).__doc__
    assert text is not None
    assert f"python benchmarks/{path.name}" in text, "it says how to run it"


@pytest.mark.parametrize(("task", "layout"), [("train", "tree"), ("score", "rows")])
def test_trees_are_measured(task: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = loaded(ROOT / "benchmarks" / "tree_batches.py")
    monkeypatch.setattr(module, "BACKBONE", {**SMALL_BACKBONE, "max_position_embeddings": 1024})
    monkeypatch.setattr(module, "WARM_UP_STEPS", 0)
    figures = module.ours(task, layout, 1, str(small_root(tmp_path, scenes=12, rows_per_scene=20)), 100)
    assert all(math.isfinite(value) and value > 0 for value in figures.values())


def test_growth_is_measured_on_as_many_rows_and_events_as_asked_for(tmp_path: Path) -> None:
    module = loaded(ROOT / "benchmarks" / "growth.py")
    corpus = load_corpus(str(module.write_root(tmp_path, rows=3_000, events=150)))
    assert len(corpus.train) == 3_000
    assert len({row.scene for row in corpus.train}) > 60, "more rows are more scenes"
    assert [len(steps) for steps in corpus.traces.values()] == [150]
    found = module.main(rows=[100], events=[], parts=["inspect"], plot=tmp_path / "plot.svg")
    assert found["inspect"]["sizes"][100]["cpu_seconds"] > 0
    assert found["inspect"]["sizes"][100]["peak_gib"] > 0
    assert "inspect" in (tmp_path / "plot.svg").read_text()


def test_the_exponent_of_growth_leaves_out_the_start() -> None:
    exponent = loaded(ROOT / "benchmarks" / "growth.py")._exponent
    assert exponent({1: 5.0, 10: 6.0, 100: 15.0}) == pytest.approx(1.0)
    assert exponent({1: 5.0, 10: 5.1, 100: 15.0}) == pytest.approx(2.0)
    assert math.isnan(exponent({1: 5.0, 10: 6.0}))


def test_the_simulation_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = loaded(ROOT / "benchmarks" / "simulated_sessions.py").main(trials=1, at_once=4)
    assert found["sessions"] == 12
    assert found["events"] > 12
    assert found["seconds"] > 0


def test_an_export_is_read_to_its_end(tmp_path: Path) -> None:
    module = loaded(ROOT / "benchmarks" / "watching.py")
    path = module.write_export(tmp_path / "export.json", 300)
    assert sum(len(bucket["events"]) for bucket in json.loads(path.read_text())["buckets"].values()) == 300
    found = module.measure(path)
    assert 50 < found["observations"] < 300
    assert found["peak"] > 0


def test_optimizers_are_compared_with_exact_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW in plain bfloat16 loses nearly all updates, adamw_8bit none."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = loaded(ROOT / "benchmarks" / "optimizers.py")
    monkeypatch.setattr(module, "OPTIMIZERS", {n: module.OPTIMIZERS[n] for n in ("adamw_8bit", "adamw, fused")})
    found = module.optimizer_figures()
    ours, plain = found["adamw_8bit"], found["adamw, fused"]
    assert ours["learned"] == pytest.approx(1, abs=0.02)
    assert ours["error"] == pytest.approx(found["rounding"]["error"], rel=0.05)
    assert ours["parameters"] == sum(math.prod(shape) for shape in module.shapes(module.SMALL | {"vocab_size": 512}))
    assert plain["learned"] == 0
    assert plain["error"] > 0.8


def test_an_optimizer_that_does_not_run_is_no_end_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = loaded(ROOT / "benchmarks" / "optimizers.py")

    def missing(parameters: object, rate: float) -> object:
        raise ImportError("no such package")

    monkeypatch.setattr(module, "OPTIMIZERS", {"missing": missing, "adamw, fused": module.OPTIMIZERS["adamw, fused"]})
    found = module.optimizer_figures()
    assert found["missing"] == {"error_message": "ImportError: no such package"}
    assert found["adamw, fused"]["milliseconds"] > 0
