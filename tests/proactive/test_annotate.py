"""The annotate command: traces in, rows out that a model is trained on, agreement, and a quick start."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from datamodules.corpus.json_records import read_jsonl
from datamodules.corpus.records import AnnotatedRow, history_digest
from datamodules.corpus.units import UnitLabel, units_of_rows
from proactive import annotate, fit
from proactive.annotation.store import Store
from tests.helpers import PROACTIVEBENCH, SMALL_RUN, needs_proactivebench, small_root
from tests.patience import HANG
from tests.proactive.annotation.serving import Client, served


def write_trace(file: Path, events: int = 3, proposals: Sequence[str] = ("Sum up.", "Translate.")) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    steps = [
        {
            "observation": {"time": str(1_717_377_997.5 + 60 * n), "event": f"The user does {file.stem} {n}."},
            "agent_response": list(proposals),
            "task_status": False,
        }
        for n in range(events)
    ]
    file.write_text(json.dumps(steps), encoding="utf-8")
    return file


def label(project: Path, answers: Callable[[int, int], UnitLabel], people: int = 3) -> None:
    """Let people label all units: what each says is a function of their number and the unit's."""
    with contextlib.closing(Store(project)) as store:
        for person in range(people):
            annotator = store.annotator(store.invite(f"person {person}"))
            assert annotator is not None
            while (item := store.claim(annotator.id)) is not None:
                store.save(annotator.id, item, answers(person, item), f"{person} {item}")


def test_traces_are_imported_labelled_and_exported(call: Callable, tmp_path: Path) -> None:
    write_trace(tmp_path / "traces" / "gpt" / "a.json")
    project = tmp_path / "p.sqlite"
    ended = call(annotate.main, "import", tmp_path / "traces", "--project", project)
    assert (ended.code, ended.err) == (0, "")
    assert "3 units added, 0 were already there" in ended.out
    assert "0 units added, 3 were already there" in call(annotate.main, "import", "traces", "--project", project).out

    label(project, lambda person, item: UnitLabel((person < 2, item == 2), item != 3))
    ended = call(annotate.main, "export", project, "--output", "root")
    assert (ended.code, ended.err) == (0, "")
    assert "9 rows of 3 units" in ended.out
    rows = read_jsonl(tmp_path / "root" / "reward_data" / "train_data.jsonl", AnnotatedRow)
    assert [row.accepted for row in rows] == [False, True, False, False, True, True, True, True, False]
    assert [row.help_needed for row in rows] == [True] * 6 + [False] * 3
    sides = [json.loads(line) for line in (tmp_path / "root" / "provenance.jsonl").read_text().splitlines()]
    assert [(side["trace"], side["step"], side["rows"], side["rule"]) for side in sides] == [
        ("a.json", step, 3, "majority") for step in range(3)
    ]
    assert sides[0]["offers"][0] == {"offer": "Sum up.", "sources": ["gpt"]}
    answer = sides[0]["labels"][2]
    assert (answer["annotator"], answer["accepted"], answer["help_needed"]) == ("person 2", [False, False], True)
    assert answer["at"] > 1.7e9
    assert 0 <= answer["seconds"] < HANG


def test_ties_are_refused_dropped_or_adjudicated(call: Callable, tmp_path: Path) -> None:
    project = tmp_path / "p.sqlite"
    call(annotate.main, "import", write_trace(tmp_path / "a.json"), "--project", project, "--annotators-per-unit", "2")
    label(project, lambda person, item: UnitLabel((person == 0 and item == 2, False), False), people=2)
    ended = call(annotate.main, "export", project, "--output", "root")
    assert ended.code == 2
    assert "1 units have ties, the first of them unit 2" in ended.err
    assert "--drop-ties" in ended.err
    assert not (tmp_path / "root").exists()
    ended = call(annotate.main, "export", project, "--output", "dropped", "--drop-ties")
    assert "8 rows of 3 units\n1 units had ties" in ended.out
    with contextlib.closing(Store(project)) as store:
        store.adjudicate(2, UnitLabel((True, False), True), "form")
    assert "9 rows of 3 units" in call(annotate.main, "export", project, "--output", "root").out
    sides = [json.loads(line) for line in (tmp_path / "root" / "provenance.jsonl").read_text().splitlines()]
    assert [one["adjudicates"] for one in sides[1]["labels"]] == [False, False, True]


def test_incomplete_units_stay_out_and_nothing_is_overwritten(call: Callable, tmp_path: Path) -> None:
    project = tmp_path / "p.sqlite"
    call(annotate.main, "import", write_trace(tmp_path / "a.json"), "--project", project, "--annotators-per-unit", "1")
    ended = call(annotate.main, "export", project, "--output", "root")
    assert (ended.code, "has no complete unit" in ended.err) == (2, True)
    with contextlib.closing(Store(project)) as store:
        one = store.annotator(store.invite("me"))
        assert one is not None
        store.save(one.id, store.claim(one.id) or 0, UnitLabel((False, False), True), "form")
    ended = call(annotate.main, "export", project, "--output", "root", "--rule", "published")
    assert (ended.code, "the rule published makes no row of its 1 complete units" in ended.err) == (2, True), ended.err
    ended = call(annotate.main, "export", project, "--output", "root")
    assert "3 rows of 1 units\n2 units are not complete" in ended.out
    ended = call(annotate.main, "export", project, "--output", "root")
    assert (ended.code, "root exists" in ended.err) == (2, True)


@needs_proactivebench
def test_a_project_of_published_rows_gives_the_published_rows(call: Callable, tmp_path: Path) -> None:
    """Those of histories with three annotators, through the project file and the command's own export."""
    rows = [row for name in ("train", "test") for row in published(name)]
    by_history: dict[int, list[AnnotatedRow]] = {}
    for row in rows:
        by_history.setdefault(row.history_digest, []).append(row)
    by_history = {key: own for key, own in by_history.items() if len(own[0].annotation) == 3}
    units = [unit for unit in units_of_rows(rows) if history_digest(unit.history) in by_history]
    project = tmp_path / "p.sqlite"
    Store.create(project, 3)
    with contextlib.closing(Store(project)) as store:
        store.add_units(units)

    def answer(person: int, item: int) -> UnitLabel:
        own = by_history[history_digest(units[item - 1].history)]
        return UnitLabel(tuple(row.annotation[person] for row in own if row.proposal is not None), False)

    label(project, answer)
    assert call(annotate.main, "export", project, "--output", "root", "--rule", "published").code == 0
    made = read_jsonl(tmp_path / "root" / "reward_data" / "train_data.jsonl", AnnotatedRow)
    expected = [row.published() for own in by_history.values() for row in own]
    assert len(made) == len(expected) == 1556
    assert sorted(json.dumps(row.published()) for row in made) == sorted(map(json.dumps, expected))


def published(name: str) -> list[AnnotatedRow]:
    return read_jsonl(PROACTIVEBENCH / "reward_data" / f"{name}_data.jsonl", AnnotatedRow)


@needs_proactivebench
def test_agreement_of_the_published_rows(call: Callable) -> None:
    ended = call(annotate.main, "agreement", PROACTIVEBENCH, "--json")
    assert (ended.code, ended.err) == (0, "")
    train, test = json.loads(ended.out).values()
    for found, known in ((train, (0.145, 0.169, -0.214)), (test, (0.658, 1.0, 0.254))):
        alphas = [found[group]["alpha"] for group in ("all", "offers", "silence")]
        assert alphas == pytest.approx(known, abs=5e-4)
        assert found["all"]["alpha_low"] < known[0] < found["all"]["alpha_high"]
    assert train["all"]["kappa"] is None  # some rows have two answers, some three
    assert test["all"]["kappa"] == pytest.approx(0.657, abs=5e-4)
    assert train["missed need"]["raw"] == 1.0
    assert "0.145 [" in call(annotate.main, "agreement", PROACTIVEBENCH).out


def test_agreement_of_a_project_by_pair(call: Callable, tmp_path: Path) -> None:
    project = tmp_path / "p.sqlite"
    for name in ("a", "b"):
        write_trace(tmp_path / "traces" / f"{name}.json")
    call(annotate.main, "import", "traces", "--project", project)
    label(project, lambda person, item: UnitLabel((person == 2, item % 2 == 0), item % 2 == 0))
    (found,) = json.loads(call(annotate.main, "agreement", project, "--json").out).values()
    assert found["person 0 and person 1"]["raw"] == found["silence"]["raw"] == 1.0
    assert found["person 0 and person 2"]["raw"] == found["person 1 and person 2"]["raw"] == pytest.approx(2 / 3)
    assert found["all"]["kappa"] is not None
    assert found["all"]["units"] == 18


def test_a_model_is_trained_on_what_was_labelled(call: Callable, tmp_path: Path) -> None:
    """Import, serve, label by three people's links, export, fit."""
    for number in range(9):
        write_trace(tmp_path / "traces" / f"{number}.json", events=4)
    project = tmp_path / "p.sqlite"
    call(annotate.main, "import", "traces", "--project", project)
    with served(project, annotators=["Ada", "Bo", "Cy"], cwd=tmp_path) as running:
        for person, name in enumerate(("Ada", "Bo", "Cy")):

            def said(unit: int, person: int = person) -> list[tuple[str, str]]:
                chosen = [("accepted", str(place)) for place in (0, 1) if unit % (place + 2) == 0]
                return [*(chosen or [("none", "1")]), ("help", "yes" if (unit + person) % 2 else "no")]

            while Client(running.links[name]).label_next(said):
                pass
    ended = call(annotate.main, "export", project, "--output", "root")
    assert "108 rows of 36 units" in ended.out
    rows = read_jsonl(tmp_path / "root" / "reward_data" / "train_data.jsonl", AnnotatedRow)
    assert [row.accepted for row in rows if row.proposal == "Sum up."] == [False, True] * 18
    ended = call(fit.main, *SMALL_RUN, "--data.root=root", "--trainer.max_epochs=1", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    (metrics,) = tmp_path.glob("runs/reward/*/metrics.json")
    assert json.loads(metrics.read_text())["rows"]["train"] > 0


def test_rows_of_a_file_and_of_a_root(call: Callable, tmp_path: Path) -> None:
    root = small_root(tmp_path / "root")
    both = json.loads(call(annotate.main, "agreement", root, "--json").out)
    assert [name.rpartition(", ")[2] for name in both] == ["train", "test"]
    (one,) = json.loads(call(annotate.main, "agreement", root / "reward_data/test_data.jsonl", "--json").out).values()
    assert one == both[f"{root}, test"]


@pytest.mark.parametrize("subcommand", ["import", "serve", "export", "agreement"])
def test_annotate_starts_without_torch_and_lightning(subcommand: str, tmp_path: Path) -> None:
    write_trace(tmp_path / "a.json")
    command = ["proactive.annotate", "import", "a.json", "--project", "p.sqlite", "--annotators-per-unit", "1"]
    arguments = {
        "import": command[1:],
        "export": ["export", "p.sqlite", "--output", "root"],
        "agreement": ["agreement", "p.sqlite"],
        "serve": ["serve", "p.sqlite", "a.json", "--port", "0"],
    }[subcommand]
    script = f"""
import contextlib, sys, uvicorn
uvicorn.Server.run = lambda *_, **__: None  # a server would go on
from proactive import annotate
from proactive.annotation.store import Store
from datamodules.corpus.units import UnitLabel
annotate.main({command[1:]!r})
with contextlib.closing(Store(__import__("pathlib").Path("p.sqlite"))) as store:
    one = store.annotator(store.invite("me"))
    store.save(one.id, store.claim(one.id), UnitLabel((True, False), True), "form")
annotate.main({arguments!r})
print(sorted({{"torch", "lightning", "torchmetrics", "transformers"}} & set(sys.modules)))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert ended.stderr == ""
    assert ended.stdout.splitlines()[-1] == "[]"
