"""Functions that several pages share: templates, the page of a unit with its questions, and its form."""

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from datamodules.corpus.event_times import moments
from datamodules.corpus.units import UnitLabel
from models.reporting.templating import template_environment
from proactive.annotation.project_file import ProjectUnit
from proactive.annotation.store import Store, StoredLabel

FOLDER = Path(__file__).parent
EVENTS_SHOWN = 6  # latest events that are shown; earlier ones are folded
MAX_FIELDS = 1000  # of a form
Check = Callable[[Request], Any]
Handler = Callable[..., Response]
ENVIRONMENT = template_environment(FOLDER / "templates")


class IncompleteError(Exception):
    """A form lacks an answer, or contains contradictory ones."""


def page(template: str, status: int = 200, **content: Any) -> Response:
    """Render a template as a page. Its content is escaped."""
    return HTMLResponse(ENVIRONMENT.get_template(template).render(**content), status)


def message(
    title: str, text: str, status: int = 200, *, link: str = "", link_text: str = "", back: str = ""
) -> Response:
    """Return a page with a message, and a link, or a button that withdraws the latest label."""
    return page("message.html", status, title=title, text=text, link=link, link_text=link_text, back=back)


def unit_page(
    template: str,
    item: ProjectUnit,
    order: Sequence[int],
    label: UnitLabel | None,
    form: FormData | None,
    problem: str,
    others: Sequence[StoredLabel] | None = None,
    **content: Any,
) -> Response:
    """Return the page of a unit with its questions.

    Args:
        template: Name of the template.
        item: The unit.
        order: Indices of its offers, in the order in which they are shown.
        label: The label that fills in the form, if there is one.
        form: A form that was refused; it fills in the page instead of the label.
        problem: Why it was refused.
        others: Labels of other people to show; None shows none.
        content: More values for the template.
    """
    texts, events = list(item.unit.offers), moments(item.unit.history)
    chosen, help_said, rejects_all = set[str](), "", False
    if form is not None:
        chosen, help_said = {str(value) for value in form.getlist("accepted")}, str(form.get("help", ""))
        rejects_all = "none" in form
    elif label is not None:
        chosen = {str(index) for index, accepted in enumerate(label.accepted) if accepted}
        help_said, rejects_all = "yes" if label.help_needed else "no", not chosen
    choices = [
        {
            "index": index,
            "text": texts[index],
            "accepted": str(index) in chosen,
            "votes": _names("Accepted by", others and [one for one in others if one.label.accepted[index]]),
        }
        for index in order
    ]
    return page(
        template,
        422 if problem else 200,
        problem=problem,
        post=secrets.token_urlsafe(12),
        choices=choices,
        rejects_all=rejects_all,
        help=help_said,
        help_votes=_names("Needed, according to", others and [one for one in others if one.label.help_needed]),
        earlier=events[:-EVENTS_SHOWN],
        recent=events[-EVENTS_SHOWN:],
        **content,
    )


def endpoint(check: Check, handler: Handler) -> Callable[[Request], Any]:
    """Return an endpoint that calls a handler with the request, the result of `check`, and the form of a POST request.

    The handler runs in a thread, because it waits for the disk.
    """

    async def answer(request: Request) -> Response:
        if request.method != "POST":
            return await run_in_threadpool(lambda: handler(request, check(request)))
        form = await request.form(max_files=0, max_fields=MAX_FIELDS)
        return await run_in_threadpool(lambda: handler(request, check(request), form))

    return answer


def read_label(form: FormData, item: ProjectUnit) -> UnitLabel:
    """Return the label in a form.

    Raises:
        IncompleteError: An answer is missing, or two answers contradict each other.
    """
    count = len(item.unit.offers)
    indices = {str(index) for index in range(count)}
    chosen = {str(value) for value in form.getlist("accepted")}
    if not chosen <= indices or (chosen and "none" in form):
        raise IncompleteError("Choose offers, or none of them.")
    if count and not chosen and "none" not in form:
        raise IncompleteError("Say which offers you would accept, or that it is none.")
    if form.get("help") not in ("yes", "no"):
        raise IncompleteError("Say whether help was needed.")
    return UnitLabel(tuple(str(index) in chosen for index in range(count)), form.get("help") == "yes")


def item_of(request: Request, store: Store) -> ProjectUnit:
    """Return the unit whose id is in the path, or answer 404."""
    number = request.path_params["item"]
    found = store.item(number) if number < 2**63 else None  # the largest integer of SQLite
    if found is None:
        raise HTTPException(404)
    return found


def home(request: Request) -> str:
    """Return the path of the first page that the token in a request's path opens."""
    return "/".join(request.url.path.split("/")[:3])


def redirect(path: str) -> Response:
    """Redirect after a POST request to a page that can be reloaded (303)."""
    return RedirectResponse(path, 303)


def _names(before: str, people: Sequence[StoredLabel] | None) -> str:
    return "" if people is None else f"{before} {', '.join(str(one.annotator) for one in people) or 'nobody'}"
