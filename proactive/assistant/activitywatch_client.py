"""Reads the buckets of an ActivityWatch server over HTTP."""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import quote, urlsplit

from pydantic import TypeAdapter

from datamodules.errors import UserError
from datamodules.escaping import error_text
from datamodules.files.reading import MAX_TEXT_BYTES
from proactive.assistant.privacy import PrivacyOptions
from proactive.assistant.span_sequence import TAB_PULSE, BucketCursor, Recording
from proactive.assistant.spans import (
    BUCKETS,
    EVENTS,
    INPUT,
    PRESENCE,
    TAB,
    TYPES,
    WINDOW,
    Read,
    Span,
    clipped,
    kinds_of,
    spans,
    validated,
)

if TYPE_CHECKING:
    from httpx2 import AsyncClient

LOOK_BACK = 60.0  # seconds before the last reported span that are read again, to notice spans that arrived too late
TIMEOUT = 10.0  # seconds per request
ADDRESS_HINT = "Start ActivityWatch, and give the address of its server, such as http://localhost:5600."
log = logging.getLogger("proactive")


class UnreachableError(Exception):
    """The server does not answer as it should; it may later."""


class ActivityWatchClient:
    """Reads a server's buckets, within `async with client`.

    Args:
        url: The address of the server.
        privacy: What is left out.

    Raises:
        UserError: This is not the address of a server.
    """

    def __init__(self, url: str, privacy: PrivacyOptions) -> None:
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound or parts.username or parts.password or parts.query or parts.fragment:
            raise UserError("the source's address is not the plain address of a server", ADDRESS_HINT)
        self.url = url.rstrip("/").removesuffix("/api/0")
        self.privacy = privacy
        self._http: AsyncClient | None = None
        self._starts: dict[str, set[float]] = {}  # by bucket: starts of the spans in the last response
        self._kinds: set[str] | None = None  # types of the buckets in the last response

    async def __aenter__(self) -> Self:
        from httpx2 import AsyncClient

        # trust_env=False ignores proxies in the environment, which would see everything.
        self._http = AsyncClient(timeout=TIMEOUT, trust_env=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def recording(self, since: float, cursors: Mapping[str, BucketCursor]) -> Recording:
        """Read the spans that are not reported yet, and the browser tabs at their time.

        Args:
            since: The beginning of the range, in epoch seconds. Spans are cut to it.
            cursors: How far each bucket has been reported; one that is missing is read from `since`.

        Raises:
            UnreachableError: The server does not answer, or not in ActivityWatch's format.
        """
        buckets = await self._read("", BUCKETS)
        kinds = kinds_of(buckets)
        self._log_missing(set(kinds.values()))
        found: dict[str, list[Span]] = {}
        waiting: list[float] = []  # starts of windows that are not reported yet
        for name, kind in sorted(kinds.items(), key=lambda item: item[1] == TAB):
            if kind == TAB:
                found[name] = await self._spans(name, kind, min(waiting) - TAB_PULSE) if waiting else []
                continue
            reported_until = cursors[name].start if name in cursors else since
            start = max(reported_until - LOOK_BACK, since)
            read = await self._spans(name, kind, start)
            self._log_late(name, kind, [span.start for span in read if span.start > start], reported_until)
            found[name] = clipped(read, since)
            if kind == WINDOW:
                waiting += [span.start for span in found[name] if name not in cursors or span.start > reported_until]
        return Recording(found, kinds)

    async def _spans(self, bucket: str, kind: str, start: float) -> list[Span]:
        events = await self._read(f"{quote(bucket, safe='')}/events?start={_time(start)}", EVENTS)
        return spans(kind, events, self.privacy)

    async def _read(self, path: str, reader: TypeAdapter[Read]) -> Read:
        from httpx2 import HTTPError

        assert self._http is not None
        content = bytearray()
        try:
            async with self._http.stream("GET", f"{self.url}/api/0/buckets/{path}") as response:
                if response.status_code != 200:
                    raise UnreachableError(f"it answers {response.status_code}")
                async for chunk in response.aiter_bytes(chunk_size=2**16):
                    content += chunk
                    if len(content) > MAX_TEXT_BYTES:
                        raise UnreachableError(f"its answer is longer than {MAX_TEXT_BYTES:,} bytes")
            return validated(bytes(content), reader, "its answer is not ActivityWatch's", ADDRESS_HINT)
        except HTTPError as error:
            raise UnreachableError(f"{type(error).__name__}: {error_text(error, 200)}".rstrip(": ")) from error
        except UserError as error:
            raise UnreachableError(error.what) from error

    def _log_missing(self, kinds: set[str]) -> None:
        if kinds == self._kinds:
            return
        self._kinds = kinds
        for kind, what in TYPES.items():
            if kind not in kinds and not (kind == INPUT and PRESENCE in kinds):
                log.info(f"{self.url} has no bucket of type {kind}, so nothing is known of {what}")

    def _log_late(self, bucket: str, kind: str, starts: list[float], reported_until: float) -> None:
        before = self._starts.get(bucket)
        late = [start for start in starts if start <= reported_until and before is not None and start not in before]
        self._starts[bucket] = set(starts)
        if late and kind != INPUT:
            log.warning(
                f"{bucket}: {len(late)} {'event' if len(late) == 1 else 'events'} came too late to be reported in order"
            )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
