"""The server of the annotation pages.

A token in the path gives access: an annotator's token to units to label, the owner's token to the overview and to
traces.
"""

import secrets
import socket
import sqlite3
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from datamodules.errors import UserError
from models.reporting.templating import TEMPLATES
from proactive.annotation.guard import Guard
from proactive.annotation.labelling import Labelling
from proactive.annotation.overview import Overview
from proactive.annotation.pages import FOLDER, message
from proactive.annotation.store import Store
from proactive.annotation.trace_reader import Reader, ShownSource

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STATIC = {
    "look.css": (TEMPLATES, "text/css"),
    "timeline.js": (TEMPLATES, "text/javascript"),
    "label.css": (FOLDER / "static", "text/css"),
    "label.js": (FOLDER / "static", "text/javascript"),
}


def application(
    store: Store | None, sources: Sequence[ShownSource], owner: str, hosts: Sequence[str], port: int
) -> ASGIApp:
    """Return the application that answers requests.

    Args:
        store: The project, if there is one.
        sources: Traces to show.
        owner: The owner's token.
        hosts: The names and addresses that people use for this server.
        port: Its port.
    """

    def is_owner(request: Request) -> None:
        if not secrets.compare_digest(request.path_params["token"].encode(), owner.encode()):
            raise HTTPException(404)

    routes = [static_files()]
    if sources:
        reader = Reader(sources, is_owner)
        routes += reader.routes() if store else [reader.first_page(), *reader.routes()]
    if store:
        routes += [*Labelling(store).routes(), *Overview(store, bool(sources), is_owner).routes()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_page, sqlite3.Error: _no_project})
    app.router.redirect_slashes = False
    return Guard(app, hosts, port)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 chooses a free port.

    Raises:
        UserError: The address is unknown, or the port is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UserError(f"cannot listen on {host}, port {port}: {reason}", "Give another --host or --port.") from error


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until the process gets a signal; requests in progress are finished."""
    uvicorn_server(app).run(sockets=[listening])


def uvicorn_server(app: ASGIApp) -> uvicorn.Server:
    """Return a server that logs no requests, because their paths contain tokens."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
    )
    return uvicorn.Server(config)


def static_files() -> Route:
    """Serve styles and scripts. They are read once, and paths in requests are never opened as files."""
    files = {name: ((folder / name).read_text(encoding="utf-8"), kind) for name, (folder, kind) in STATIC.items()}

    def answer(request: Request) -> Response:
        if request.path_params["name"] not in files:
            raise HTTPException(404)
        content, kind = files[request.path_params["name"]]
        return Response(content, media_type=kind)

    return Route("/static/{name}", answer)


def _no_page(request: Request, error: Any) -> Response:
    text = "There is no such page, or the link is no longer valid. Ask the person who sent it for a new one."
    return message("Not found" if error.status_code == 404 else "That does not work", text, error.status_code)


def _no_project(request: Request, error: Exception) -> Response:
    """Report an error of the disk or the database. Nothing was saved."""
    text = f"The project file does not work: {error}. Nothing was saved; go back and try again."
    return message("Not saved", text, 503)
