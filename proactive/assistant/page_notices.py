"""Offers on a page that a server on this machine serves. Only who knows its link can see and answer them."""

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from models.reporting.templating import template_environment
from proactive.annotation.guard import Guard
from proactive.annotation.pages import FOLDER as ANNOTATION_FOLDER
from proactive.annotation.server import LOOPBACK, listen, static_files, uvicorn_server
from proactive.assistant.deciding import Reply
from proactive.assistant.notices import Notices, Offer, OnAnswer
from proactive.terminal import say

HOST = "127.0.0.1"
REFRESH_SECONDS = 3  # of a page without an offer; with one it stays as it is, so that nobody clicks on another
ENVIRONMENT = template_environment(Path(__file__).parent / "templates", ANNOTATION_FOLDER / "templates")


class PageNotices(Notices):
    """Serves the page while a session runs.

    Args:
        port: The port; 0 is any that is free.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._token = secrets.token_urlsafe(24)
        self._offer: Offer | None = None
        self._latest: dict[str, str] | None = None  # what became of the last offer
        self._on_answer: OnAnswer = lambda number, accepted: None

    def running(self, on_answer: OnAnswer) -> AbstractAsyncContextManager[object]:
        loop = asyncio.get_running_loop()

        def tell(number: int, accepted: bool) -> None:
            loop.call_soon_threadsafe(on_answer, number, accepted)

        self._on_answer = tell
        return self._serving()

    async def show(self, offer: Offer) -> None:
        self._offer = offer

    async def end(self, offer: Offer, reply: Reply) -> None:
        draft = offer.draft if reply == Reply.ACCEPTED else ""
        self._offer, self._latest = None, {"proposal": offer.proposal, "reply": reply.value, "draft": draft}

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        """Serve in a thread, because the event loop of the session also runs models."""
        with listen(HOST, self.port) as listening:
            port = listening.getsockname()[1]
            routes = [Route("/offers/{token}", self._page, methods=["GET", "POST"]), static_files()]
            server = uvicorn_server(Guard(Starlette(routes=routes), LOOPBACK, port))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            say(f"offers: http://{HOST}:{port}/offers/{self._token}")
            try:
                yield
            finally:
                server.should_exit = True
                await asyncio.to_thread(thread.join)

    async def _page(self, request: Request) -> Response:
        if not secrets.compare_digest(request.path_params["token"].encode(), self._token.encode()):
            raise HTTPException(404)
        if request.method == "POST":
            form = await request.form(max_files=0, max_fields=2)
            offer = self._offer
            if offer is not None and form.get("number") == str(offer.number) and form.get("answer") in ("yes", "no"):
                self._offer = None
                self._on_answer(offer.number, form.get("answer") == "yes")
            return RedirectResponse(request.url.path, 303)
        content: dict[str, Any] = {"offer": self._offer, "latest": self._latest, "seconds": REFRESH_SECONDS}
        headers = {} if self._offer else {"Refresh": str(REFRESH_SECONDS)}
        return HTMLResponse(ENVIRONMENT.get_template("offer.html").render(**content), headers=headers)
