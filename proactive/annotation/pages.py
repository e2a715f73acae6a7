"""What all pages share: templates, the page of a unit with its questions, forms, and who is let in."""

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
from proactive.annotation.store import Item, Store, StoredLabel

HERE = Path(__file__).parent
EVENTS_SHOWN = 6  # the latest; earlier ones are folded
MOST_FIELDS = 1000  # of a form
Check = Callable[[Request], Any]
Handler = Callable[..., Response]
ENVIRONMENT = template_environment(HERE / "templates")


class IncompleteError(Exception):
    """A form leaves a question open, or contradicts itself."""


def page(template: str, status: int = 200, **content: Any) -> Response:
    """A template as a page; all that it is given stands there escaped."""
    return HTMLResponse(ENVIRONMENT.get_template(template).render(**content), status)


def message(
    title: str, text: str, status: int = 200, *, link: str = "", link_text: str = "", back: str = ""
) -> Response:
    """A page that says one thing, with a link onwards, or a button that takes the last label back."""
    return page("message.html", status, title=title, text=text, link=link, link_text=link_text, back=back)


def unit_page(
    template: str,
    item: Item,
    order: Sequence[int],
    label: UnitLabel | None,
    form: FormData | None,
    problem: str,
    people: Sequence[StoredLabel] | None = None,
    **content: Any,
) -> Response:
    """A unit with its questions, filled in.

    Args:
        template: The page's.
        item: The unit.
        order: In which order its offers are shown.
        label: What is filled in, if there is one.
        form: What is filled in instead, if a form could not be taken.
        problem: Why not.
        people: Whose labels are shown beside; None shows nothing of others.
        content: What else the template needs.
    """
    texts, events = list(item.unit.offers), moments(item.unit.history)
    chosen, help_said, rejects_all = set[str](), "", False
    if form is not None:
        chosen, help_said = {str(value) for value in form.getlist("accepted")}, str(form.get("help", ""))
        rejects_all = "none" in form
    elif label is not None:
        chosen = {str(place) for place, accepted in enumerate(label.accepted) if accepted}
        help_said, rejects_all = "yes" if label.help_needed else "no", not chosen
    choices = [
        {
            "place": place,
            "text": texts[place],
            "accepted": str(place) in chosen,
            "votes": _names("Accepted by", people and [one for one in people if one.said.accepted[place]]),
        }
        for place in order
    ]
    return page(
        template,
        422 if problem else 200,
        problem=problem,
        post=secrets.token_urlsafe(12),
        choices=choices,
        rejects_all=rejects_all,
        help=help_said,
        help_votes=_names("Needed, according to", people and [one for one in people if one.said.help_needed]),
        earlier=events[:-EVENTS_SHOWN],
        recent=events[-EVENTS_SHOWN:],
        **content,
    )


def endpoint(check: Check, handler: Handler) -> Callable[[Request], Any]:
    """A handler that gets what `check` says of who asks, and the form if one was sent.

    It runs in a thread, for it waits for the disk.
    """

    async def answer(request: Request) -> Response:
        if request.method != "POST":
            return await run_in_threadpool(lambda: handler(request, check(request)))
        form = await request.form(max_files=0, max_fields=MOST_FIELDS)
        return await run_in_threadpool(lambda: handler(request, check(request), form))

    return answer


def read_label(form: FormData, item: Item) -> UnitLabel:
    """What a form says of a unit.

    Raises:
        IncompleteError: A question is open, or is answered in two ways.
    """
    count = len(item.unit.offers)
    places = {str(place) for place in range(count)}
    chosen = {str(value) for value in form.getlist("accepted")}
    if not chosen <= places or (chosen and "none" in form):
        raise IncompleteError("Choose offers, or none of them.")
    if count and not chosen and "none" not in form:
        raise IncompleteError("Say which offers you would accept, or that it is none.")
    if form.get("help") not in ("yes", "no"):
        raise IncompleteError("Say whether help was needed.")
    return UnitLabel(tuple(str(place) in chosen for place in range(count)), form.get("help") == "yes")


def item_of(request: Request, store: Store) -> Item:
    """The unit that a path names."""
    number = request.path_params["item"]
    found = store.item(number) if number < 2**63 else None  # SQLite has no greater ones
    if found is None:
        raise HTTPException(404)
    return found


def home(request: Request) -> str:
    """The first page of whom the token belongs to, as a path."""
    return "/".join(request.url.path.split("/")[:3])


def redirect(path: str) -> Response:
    """To a page that may be loaded again."""
    return RedirectResponse(path, 303)


def _names(before: str, people: Sequence[StoredLabel] | None) -> str:
    return "" if people is None else f"{before} {', '.join(str(one.annotator) for one in people) or 'nobody'}"
