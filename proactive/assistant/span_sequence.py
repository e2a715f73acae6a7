"""Merges the spans of several buckets into one sequence of sentences on what the user did.

The sequence only depends on the spans, not on when they arrived. So a live session and the export of the same time
give the same sequence. These are the rules:

- A window that is in front for less than `MIN_WINDOW` seconds is left out.
- Successive spans of one application, or of one project in an editor, are reported in one sentence. The sentence begins
  with its first span. It ends when another application or project follows, after a pause of `MAX_PAUSE` seconds, or
  `MAX_WAIT` seconds after it began. Each span is reported once, in the sentence in which it starts.
- The time of a sentence is the earliest time at which its content is known.
- The content of a browser's window is taken from the newest tab with the window's title. A private tab is left out.
"""

import heapq
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from proactive.assistant import sentences
from proactive.assistant.spans import (
    AWAY_AFTER,
    EDITOR,
    INPUT,
    PRESENCE,
    TAB,
    TYPES,
    WINDOW,
    Edited,
    Span,
    Status,
    Tab,
    Window,
)

MIN_WINDOW = 3.0  # seconds
MAX_PAUSE = 30.0  # seconds without a heartbeat; the watchers send one in at most 20
MAX_WAIT = 60.0  # seconds after which an application that stays in front is reported
TAB_PULSE = 80.0  # seconds for which a tab is open after its latest heartbeat; the watchers send one a minute
MAX_TABS = 100  # of one browser, looked at for a title
BROWSERS = re.compile(
    r"browser|firefox|chrom|safari|edge\b|brave|opera\b|vivaldi|librewolf|waterfox|pale ?moon|seamonkey|epiphany|"
    r"konqueror|falkon|floorp|iridium|thorium|midori|maxthon|duckduckgo|yandex|浏览器|"
    r"\b(zen|arc|dia|comet|orion|min|navigator|iexplore)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class BucketCursor:
    """How far a bucket has been reported.

    Attributes:
        start: All its spans that start until then have been reported.
        away_since: When the user went away, if that has been reported.
        back_at: When the user came back, if that has been reported, but not yet in a sentence.
    """

    start: float = 0.0
    away_since: float | None = None
    back_at: float | None = None


@dataclass(frozen=True)
class BucketStep:
    """One step through a bucket: some spans, and what is reported of them.

    Attributes:
        at: The earliest time at which it is known, in epoch seconds.
        bucket: The bucket.
        cursor: How far the bucket is reported after the step.
        output: A sentence; or whether the user is away; None if there is nothing to report.
    """

    at: float
    bucket: str
    cursor: BucketCursor
    output: str | bool | None


@dataclass(frozen=True)
class Recording:
    """What some buckets recorded.

    Attributes:
        spans: The spans by bucket, in the order of their start.
        kinds: The type of each bucket.
    """

    spans: Mapping[str, Sequence[Span]]
    kinds: Mapping[str, str]

    def of_type(self, kind: str) -> list[str]:
        """Return the buckets of a type."""
        return sorted(bucket for bucket, found in self.kinds.items() if found == kind)


def emit(recording: Recording, cursors: Mapping[str, BucketCursor], until: float) -> Iterator[BucketStep]:
    """Yield all steps that are known until a time, in the order in which they are known.

    Args:
        recording: The spans, at least all that are not reported yet and the tabs during them.
        cursors: How far each bucket has been reported; one that is missing is reported from its first span.
        until: Everything that happened before this time, in epoch seconds, is part of the recording.
    """
    tabs = Tabs(recording)
    steps: list[Iterator[BucketStep]] = []
    for bucket, kind in recording.kinds.items():
        cursor = cursors.get(bucket, BucketCursor())
        later = [span for span in recording.spans[bucket] if span.start > cursor.start]
        if kind in (WINDOW, EDITOR):
            steps.append(_activity(bucket, later, cursor, until, tabs, MIN_WINDOW if kind == WINDOW else 0.0))
        elif kind in (PRESENCE, INPUT):
            steps.append(_presence(bucket, later, cursor, until))
    order = {kind: number for number, kind in enumerate(TYPES)}
    return heapq.merge(*steps, key=lambda step: (step.at, order[recording.kinds[step.bucket]], step.bucket))


class Tabs:
    """Finds the browser tab that a window showed."""

    def __init__(self, recording: Recording) -> None:
        self._spans = [recording.spans[bucket] for bucket in recording.of_type(TAB)]
        self._starts = [[span.start for span in spans] for spans in self._spans]

    def shown(self, title: str, start: float, end: float) -> Tab | None:
        """Return the newest tab whose title is part of a window's title.

        Args:
            title: The title of the window.
            start: The beginning of the time when this window was in front, in epoch seconds.
            end: The end of this time.
        """
        newest: Span | None = None
        for spans, starts in zip(self._spans, self._starts, strict=True):
            last = bisect_right(starts, end)
            for span in reversed(spans[max(last - MAX_TABS, 0) : last]):
                if newest is not None and span.start <= newest.start:
                    break
                tab = span.content
                if isinstance(tab, Tab) and tab.title and tab.title in title and span.end + TAB_PULSE >= start:
                    newest = span
                    break
        return newest.content if newest is not None and isinstance(newest.content, Tab) else None


@dataclass
class _Sentence:
    """Spans that are reported together."""

    members: list[Span]
    end: float

    @property
    def limit(self) -> float:
        """The latest time at which another span of this sentence can start."""
        return min(self.members[0].start + MAX_WAIT, self.end + MAX_PAUSE)

    def takes(self, span: Span) -> bool:
        return span.start <= self.limit and _subject(span) == _subject(self.members[0])

    def add(self, span: Span) -> None:
        self.members.append(span)
        self.end = max(self.end, span.end)

    def text(self, tabs: Tabs) -> str:
        first = self.members[0].content
        if isinstance(first, Edited):
            files = [span.content.file for span in self.members if isinstance(span.content, Edited)]
            return sentences.editing(first.project, list(dict.fromkeys(files)))
        assert isinstance(first, Window)
        windows = [(span, span.content) for span in self.members if isinstance(span.content, Window)]
        until = self.members[0].start + MAX_WAIT
        shown = [(window, tabs.shown(window.title, span.start, min(span.end, until))) for span, window in windows]
        if not BROWSERS.search(first.app):
            titles = [window.title for window, tab in shown if tab is None or not tab.private]
            return sentences.working(first.app, list(dict.fromkeys(titles)))
        public = [tab for _, tab in shown if tab is not None and not tab.private]
        titles = [tab.title for tab in public]
        return sentences.browsing(first.app, list(dict.fromkeys(titles)), public[-1].address if public else None)


def _subject(span: Span) -> str:
    content = span.content
    return content.app if isinstance(content, Window) else content.project if isinstance(content, Edited) else ""


def _activity(
    bucket: str, later: Sequence[Span], cursor: BucketCursor, until: float, tabs: Tabs, shortest: float
) -> Iterator[BucketStep]:
    sentence: _Sentence | None = None

    def step(at: float) -> BucketStep:
        assert sentence is not None
        return BucketStep(at + shortest, bucket, BucketCursor(sentence.members[-1].start), sentence.text(tabs))

    for number, span in enumerate(later):
        if span.start + shortest > until:
            break
        if span.content is None or span.end - span.start < shortest:
            if sentence is None and number + 1 < len(later):  # the span has ended, because another one follows
                yield BucketStep(span.start + shortest, bucket, BucketCursor(span.start), None)
        elif sentence is not None and sentence.takes(span):
            sentence.add(span)
        else:
            if sentence is not None:
                yield step(min(sentence.limit, span.start))
            sentence = _Sentence([span], span.end)
    if sentence is not None and sentence.limit + shortest <= until:
        yield step(sentence.limit)


def _presence(bucket: str, later: Sequence[Span], cursor: BucketCursor, until: float) -> Iterator[BucketStep]:
    if cursor.away_since is not None and cursor.back_at is not None:
        yield BucketStep(
            cursor.back_at, bucket, BucketCursor(cursor.start), sentences.returning(cursor.back_at - cursor.away_since)
        )
        cursor = BucketCursor(cursor.start)
    for number, span in enumerate(later):
        away, since = isinstance(span.content, Status) and span.content.away, cursor.away_since
        at = span.start
        if away and since is None:
            over = later[number + 1].start if number + 1 < len(later) else float("inf")
            at = min(span.start + AWAY_AFTER, over)
        if at > until:
            break
        if away and since is None:
            cursor = BucketCursor(span.start, away_since=span.start)
            yield BucketStep(at, bucket, cursor, True)
        elif not away and since is not None:
            yield BucketStep(at, bucket, BucketCursor(span.start, since, at), False)
            cursor = BucketCursor(span.start)
            yield BucketStep(at, bucket, cursor, sentences.returning(at - since))
        else:
            cursor = replace(cursor, start=span.start)
            yield BucketStep(at, bucket, cursor, None)
