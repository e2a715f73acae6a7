"""The trace reader: what it reads, what it shows of it, and that it is found by search, filter and link."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from datamodules.corpus.records import Event
from datamodules.corpus.simulator import simulate
from datamodules.errors import UserError
from models.reporting.timeline import TIMELINE_FILE, ShownOffer, ShownStep, ShownTrace, ShownTraces
from proactive.annotation.trace_reader import read_sources, source_of_rows
from proactive.evaluation.evaluation_report import evaluation_report
from tests.helpers import PROACTIVEBENCH, command, needs_proactivebench
from tests.proactive.annotation.conftest import page_of
from tests.proactive.annotation.serving import Client, project, served
from tests.proactive.evaluation.test_evaluation_report import LONG as LONG_OFFER
from tests.proactive.evaluation.test_evaluation_report import NULL, TEXT, judged, record_of

SCRIPT = "<script>document.title = 'obeyed'</script>"
LONG = "The agent thinks at length. " * 20


def write(file: Path, *steps: tuple[str, Any, list[bool]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = [
        {
            "observation": {"time": str(1_717_377_997.25 + 65 * n), "event": event},
            "agent_response": offers,
            "task_status": False,
            "judgement": judged,
            "other_infomation": {"Thoughts": LONG, "Purpose": "short"},
        }
        for n, (event, offers, judged) in enumerate(steps)
    ]
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def outcomes(path: Path) -> list[str]:
    (source,) = read_sources([path])
    return [step.outcome for trace in source.traces for step in trace.steps]


def test_judged_traces_have_outcomes(tmp_path: Path) -> None:
    file = write(
        tmp_path / "judge" / "a.json",
        ("reads", ["Sum up."], [True]),
        ("reads", ["Sum up."], [False]),
        ("reads", [None], [True]),
        ("reads", [None], [False]),
        ("reads", ["Sum up."], []),
        ("reads", ["One.", "Two."], [False, True]),
    )
    assert outcomes(file) == ["tp", "fp", "tn", "fn", "undecided", "tp"]
    (source,) = read_sources([file.parent])
    assert (source.name, [offer.counts for offer in source.traces[0].steps[5].offers]) == ("judge", [False, True])


def test_reference_proposals_are_read_as_well(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    step = {"observation": {"time": "1", "event": "reads"}, "agent_response": {"candidate_task": ["One.", "Two."]}}
    file.write_text(json.dumps([step | {"task_status": True}]), encoding="utf-8")
    (source,) = read_sources([file])
    assert [offer.text for offer in source.traces[0].steps[0].offers] == ["One.", "Two."]


def test_sources_with_equal_names_are_numbered(tmp_path: Path) -> None:
    for folder in ("x/same", "y/same"):
        write(tmp_path / folder / "a.json", ("reads", [None], []))
    assert [one.name for one in read_sources([tmp_path / "x/same", tmp_path / "y/same"])] == ["same (1)", "same (2)"]


def test_a_file_that_is_not_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no traces"):
        read_sources([tmp_path])
    tmp_path.joinpath(TIMELINE_FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"timeline\.json, field notes"):
        read_sources([tmp_path])


def test_rows_are_read_as_scenes_with_peoples_judgments() -> None:
    train, _, _ = simulate()
    rows = [row for row in train if row.scene == train[0].scene]
    source = source_of_rows("people", rows)
    (shown,) = source.traces
    assert [event.event for event in shown.events] == [event.event for event in rows[-1].history]
    offers = [offer for step in shown.steps for offer in step.offers]
    assert [(offer.text, offer.verdict) for offer in offers] == [(row.proposal, row.accepted) for row in rows]
    assert {step.outcome for step in shown.steps} <= {"tp", "fp", "tn", "fn"}


@needs_proactivebench
def test_the_published_traces_of_five_agents_are_shown_side_by_side() -> None:
    found = read_sources([PROACTIVEBENCH / "traces"])
    assert [source.name for source in found] == [
        "activeqwen",
        "gpt-4o",
        "llama3.1-8b",
        "qwen2-72b-instruct",
        "qwen2-7b",
    ]
    assert {sum(len(trace.steps) for trace in source.traces) for source in found} == {227}


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two judges on one agent, as `evaluate agent` leaves them."""
    folder = tmp_path_factory.mktemp("evaluations")
    events = tuple(Event(time=str(1_717_377_997 + 5 * n), event=f"The user does {n} {SCRIPT}.") for n in range(3))
    texts = ("Sum up.", None, f"Fix it. {SCRIPT}")
    judged: dict[str, Sequence[tuple[bool, str]]] = {
        "strict": ((False, "fp"), (True, "tn"), (False, "fp")),
        "mild": ((True, "tp"), (True, "tn"), (False, "fp")),
    }
    for judge, verdicts in judged.items():
        steps = tuple(
            ShownStep((ShownOffer(text, True, accepted, 0.625, thought=LONG, notes={"Purpose": "short"}),), name)
            for text, (accepted, name) in zip(texts, verdicts, strict=True)
        )
        kept = ShownTraces(notes=(f"CONTAMINATED: {judge}", "small"), traces=(ShownTrace("a b.json", events, steps),))
        (folder / judge).mkdir()
        (folder / judge / TIMELINE_FILE).write_text(kept.model_dump_json(), encoding="utf-8")
    return [folder / "strict", folder / "mild"]


@pytest.fixture(scope="module")
def link(evaluations: list[Path]) -> Iterator[str]:
    with served(*evaluations, cwd=evaluations[0]) as running:
        yield running.links["traces"]


def test_the_reader_needs_the_owners_token(link: str) -> None:
    client = Client(link)
    assert client.ask(client.path).headers["location"] == f"{client.path}/read"
    for path in ("/o/wrong/read", "/o/wrong/read/a_b.json", f"{client.path}/read/other", f"{client.path}/read/..%2f"):
        assert client.ask(path).status == 404
    assert client.ask(f"{client.path}/invite", [("name", "me")]).status == 404  # there is no project


def test_a_search_finds_events_in_all_traces(link: str) -> None:
    client = Client(link)
    for query, count in (
        ("text=SUM+UP", 1),
        ("text=at+length", 3),
        ("text=nothing+like+it", 0),
        ("outcome=tn", 1),
        ("outcome=tn&outcome=tp", 2),
        ("differs=1", 1),
        ("differs=1&outcome=tn", 0),
        ("text=does+2&outcome=fp", 1),
    ):
        page = client.ask(f"{client.path}/read?{query}")
        assert f"{count} events" in page.text, query
        assert page.text.count('<li class="step"') == count
    found = client.ask(f"{client.path}/read?text=sum+up").text
    assert f'href="{client.path}/read/a_b.json#a_b.json-1"' in found


def test_traces_are_read_in_a_browser(browser: Any, link: str) -> None:
    with page_of(browser, link) as page:
        assert "CONTAMINATED: strict" in page.text_content("main")
        page.click("text=a b.json")
        assert page.title() == "a b.json"
        assert page.locator(".step").count() == 3
        first = page.locator(".step").nth(0)
        assert "01:26:37" in first.text_content()
        assert "+5 s" in page.locator(".step").nth(1).text_content()
        assert "P 0.625" in first.text_content()
        assert not first.locator("details.aside").first.get_attribute("open")
        assert first.locator(".source").count() == 2
        page.check("#differs")
        assert page.locator(".step:visible").count() == 1
        assert page.text_content("#found") == "1 of 3 events"
        page.uncheck("#differs")
        page.uncheck("input[value=fp]")
        assert page.locator(".step:visible").count() == 2
        page.check("input[value=fp]")
        page.fill("#text", "fix it")
        assert page.locator(".step:visible").count() == 1
        assert SCRIPT in page.text_content("main")
        page.fill("#text", "")
        page.click("[aria-label='Link to event 3 of a b.json']")
        assert page.url.endswith("#a_b.json-3")
        assert page.locator(".step:target").count() == 1


@pytest.mark.parametrize("width", [1280, 800, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_readers_pages_are_accessible_and_fit(
    browser: Any, link: str, faults: Callable[[Any], list[str]], width: int, scheme: str
) -> None:
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    for path in ("/read", "/read?differs=1", "/read/a_b.json"):
        with page_of(browser, link + path, **options) as page:
            assert faults(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_has_the_same_timeline_and_filters(
    browser: Any, tmp_path: Path, faults: Callable[[Any], list[str]], scheme: str
) -> None:
    """report.html of an evaluation, opened as a file: filters, accessibility, and plots that are drawn."""
    events = judged([[TEXT], [LONG_OFFER], [NULL]])
    file = tmp_path / "report.html"
    file.write_text(evaluation_report(record_of(events), events), encoding="utf-8")
    with page_of(browser, file.as_uri(), color_scheme=scheme, viewport={"width": 800, "height": 900}) as page:
        assert page.locator(".step").count() == 3
        page.uncheck("input[value=fp]")
        assert page.locator(".step:visible").count() == 2
        assert page.text_content("#found") == "2 of 3 events"
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert faults(page) == []


def test_a_project_and_traces_are_served_together(tmp_path: Path) -> None:
    file = project(tmp_path / "p.sqlite", 1, 1)
    write(tmp_path / "traces" / "a.json", ("reads", ["Sum up."], [True]))
    with served(file, "traces", annotators=["Ada"], cwd=tmp_path) as running:
        owner, ada = Client(running.links["overview"]), Client(running.links["Ada"])
        assert f"{owner.path}/read" in owner.ask(owner.path).text
        assert "Sum up." in owner.ask(f"{owner.path}/read/a.json").text
        assert ada.ask(f"{ada.path}/read").status == 404


def test_annotators_without_a_project_and_two_projects_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "traces" / "a.json", ("reads", ["Sum up."], [True]))
    for name in ("p.sqlite", "q.sqlite"):
        project(tmp_path / name, 1, 1)
    for arguments, says in (
        (["traces", "--annotators", "Ada"], "--annotators: there is no project"),
        (["p.sqlite", "q.sqlite"], "q.sqlite is a second project"),
    ):
        ended = command("proactive.annotate", "serve", *arguments, cwd=tmp_path)
        assert ended.returncode == 2
        assert says in ended.stderr
