"""Middleware that checks Host, Origin and size of each request, and adds security headers to each response."""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_FORM_BYTES = 64 * 1024  # forms have a few hundred
FORM = "application/x-www-form-urlencoded"  # the other type of forms can contain files
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer a browser would not tell a form's origin
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses requests that another site may have caused (CSRF, DNS rebinding).

    Args:
        app: The application that answers all other requests.
        hosts: The names and addresses that people use for this server, without port.
        port: Its port.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], port: int) -> None:
        self.app = app
        names = {f"[{host}]" if ":" in host else host.lower() for host in hosts}
        self.hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        if refusal:
            status, why = refusal
            await PlainTextResponse(f"{why}\n", status)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        if headers.get("host", "").lower() not in self.hosts:
            return 421, "This server is not known by that name; see --names."
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return 405, "Only GET and POST are answered."
        origin = urlsplit(headers.get("origin", ""))
        if origin.scheme not in ("http", "https") or origin.netloc.lower() != headers["host"].lower():
            return 403, "Only forms of this server's own pages are accepted."
        if headers.get("content-type", FORM).partition(";")[0].strip().lower() != FORM:
            return 415, "Files are not accepted."
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdecimal()):
            return 411, "The Content-Length is missing."
        return (413, "The form is too long.") if int(length) > MAX_FORM_BYTES else None
