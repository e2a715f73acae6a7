"""The trace reader: pages that show traces of several sources side by side, with filters, search and links."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from datamodules.corpus.json_records import read_json
from datamodules.corpus.records import AnnotatedRow
from datamodules.corpus.traces import ProposalKey, Recorded, Trace, read_traces
from datamodules.files.reading import MAX_RECORDS_BYTES
from models.reporting.timeline import (
    TIMELINE_FILE,
    ShownOffer,
    ShownStep,
    ShownTrace,
    ShownTraces,
    Timeline,
    outcome,
    outcomes_of,
    timelines,
)
from proactive.annotation.pages import endpoint, home, page, redirect

MAX_FOUND = 300  # events that a search shows


@dataclass(frozen=True)
class ShownSource:
    """The traces of one evaluation or one folder: with the offers of one agent, and the verdicts of one judge."""

    name: str
    traces: Sequence[ShownTrace]
    notes: Sequence[str] = ()


def read_sources(paths: Sequence[Path]) -> list[ShownSource]:
    """Read folders of evaluations, and traces of either layout. Each folder in a folder is a source.

    Raises:
        UserError: There is no trace, or one does not fit; the message names file, location and field.
    """
    found: list[ShownSource] = []
    for path in paths:
        if (file := path / TIMELINE_FILE).is_file():
            kept, _ = read_json(file, ShownTraces, MAX_RECORDS_BYTES)
            found.append(ShownSource(path.resolve().name, kept.traces, kept.notes))
        else:
            found += [
                ShownSource(name, [_shown_trace(trace, recorded) for trace in recorded.traces])
                for name, recorded in read_traces(path).items()
            ]
    names = Counter(source.name for source in found)
    return [
        replace(source, name=f"{source.name} ({index})") if names[source.name] > 1 else source
        for index, source in enumerate(found, 1)
    ]


def source_of_rows(name: str, rows: Sequence[AnnotatedRow]) -> ShownSource:
    """Return annotated rows as one source, in which each event of a scene has its proposals and their judgments."""
    by_scene: dict[str, dict[int, list[AnnotatedRow]]] = {}
    for row in rows:
        by_scene.setdefault(row.scene, {}).setdefault(len(row.history), []).append(row)
    traces = []
    for scene, by_length in by_scene.items():
        events = by_length[max(by_length)][0].history
        judged = [[(row.proposal, row.accepted) for row in by_length.get(n + 1, ())] for n in range(len(events))]
        traces.append(ShownTrace(scene, events, tuple(map(_shown_step, judged))))
    return ShownSource(name, traces)


class Reader:
    """The pages below /o/TOKEN/read.

    Args:
        sources: The traces to show.
        is_owner: Raises if the token of a request is not the owner's.
    """

    def __init__(self, sources: Sequence[ShownSource], is_owner: Callable[[Request], None]) -> None:
        self.sources, self.is_owner = [source.name for source in sources], is_owner
        warnings = ((source.name, note) for source in sources for note in source.notes if note.split(":")[0].isupper())
        self.notes = [f"{name}: {note}" if len(sources) > 1 else note for name, note in warnings]
        joined = timelines([source.traces for source in sources])
        self.timelines, self.outcomes = {one.anchor: one for one in joined}, outcomes_of(joined)

    def routes(self) -> list[Route]:
        return [
            Route("/o/{token}/read", endpoint(self.is_owner, self.index)),
            Route("/o/{token}/read/{anchor}", endpoint(self.is_owner, self.trace)),
        ]

    def first_page(self) -> Route:
        """Return the first page of a server without a project: it redirects to the traces."""
        return Route("/o/{token}", endpoint(self.is_owner, lambda request, _: redirect(f"{home(request)}/read")))

    def index(self, request: Request, _: None) -> Response:
        """List all traces, or the events that a search found."""
        asked = request.query_params
        text, wanted, differs = asked.get("text", ""), asked.getlist("outcome"), "differs" in asked
        found: list[Timeline] = []
        count = 0
        if asked:
            for one in self.timelines.values():
                lines = tuple(
                    line
                    for line in one.lines
                    if text.lower().strip() in line.words
                    and (not wanted or set(wanted) & set(line.outcomes))
                    and (line.differs or not differs)
                )
                kept = lines[: max(MAX_FOUND - count, 0)]
                count += len(lines)
                found += [replace(one, lines=kept)] if kept else []
        counts = {
            anchor: Counter(name for line in one.lines for name in line.outcomes)
            for anchor, one in self.timelines.items()
        }
        return page(
            "read.html",
            home=home(request),
            sources=self.sources,
            notes=self.notes,
            timelines=list(self.timelines.values()),
            counts=counts,
            outcomes=self.outcomes,
            text=text,
            wanted=wanted,
            differs=differs,
            searched=bool(asked),
            found=found,
            count=count,
            limit=MAX_FOUND,
            links={anchor: f"{home(request)}/read/{quote(anchor)}" for anchor in self.timelines},
        )

    def trace(self, request: Request, _: None) -> Response:
        anchor, anchors = request.path_params["anchor"], list(self.timelines)
        if anchor not in self.timelines:
            raise HTTPException(404)
        index = anchors.index(anchor)
        return page(
            "trace.html",
            home=home(request),
            sources=self.sources,
            notes=self.notes,
            timeline=self.timelines[anchor],
            outcomes=self.outcomes,
            before=quote(anchors[index - 1]) if index else "",
            after=quote(anchors[index + 1]) if index + 1 < len(anchors) else "",
        )


def _shown_trace(trace: Trace, recorded: Recorded) -> ShownTrace:
    steps = []
    for step, candidates in enumerate(recorded.answers[trace.name]):
        verdicts = [recorded.judgments.get(ProposalKey(trace.name, step, one.proposal)) for one in candidates]
        notes = [{title: str(text) for title, text in one.notes.items() if text} for one in candidates]
        judged = [(one.proposal, verdict) for one, verdict in zip(candidates, verdicts, strict=True)]
        steps.append(_shown_step(judged, notes))
    return ShownTrace(trace.name, trace.events, tuple(steps))


def _shown_step(
    judged: Sequence[tuple[str | None, bool | None]], notes: Sequence[Mapping[str, str]] | None = None
) -> ShownStep:
    """Return a step with its proposals. The first accepted one decides, else the first with a verdict."""
    judged = judged or [(None, None)]
    verdicts = [verdict for _, verdict in judged]
    known = [index for index, verdict in enumerate(verdicts) if verdict is not None]
    deciding = verdicts.index(True) if True in verdicts else (known or [0])[0]
    offers = tuple(
        ShownOffer(text, verdict=verdict, notes=note, counts=index == deciding or not known)
        for index, ((text, verdict), note) in enumerate(zip(judged, notes or [{}] * len(judged), strict=True))
    )
    return ShownStep(offers, outcome(judged[deciding][0] is not None, verdicts[deciding]))
