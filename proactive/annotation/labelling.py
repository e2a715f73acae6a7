"""The pages of annotators: the next unit to label, earlier units, and the forms that save labels."""

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proactive.annotation.pages import (
    IncompleteError,
    endpoint,
    home,
    item_of,
    message,
    read_label,
    redirect,
    unit_page,
)
from proactive.annotation.project_file import Annotator, ProjectUnit
from proactive.annotation.store import RefusedError, Store


class Labelling:
    """The pages below /a/TOKEN.

    Args:
        store: The project.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def routes(self) -> list[Route]:
        unit = "/a/{token}/unit/{item:int}"
        return [
            Route("/a/{token}", endpoint(self._annotator, self.next_unit)),
            Route(unit, endpoint(self._annotator, self.unit)),
            Route(unit, endpoint(self._annotator, self.save), methods=["POST"]),
            Route("/a/{token}/back", endpoint(self._annotator, self.withdraw_latest), methods=["POST"]),
        ]

    def next_unit(self, request: Request, annotator: Annotator) -> Response:
        number = self.store.claim(annotator.id)
        item = None if number is None else self.store.item(number)
        if item is not None:
            return self._page(request, annotator, item, notice="Saved." if "saved" in request.query_params else "")
        progress = self.store.progress(annotator.id)
        text = f"You have labelled {progress.done} units, and nothing is left for you. Thank you!"
        if progress.left:
            text = f"You have labelled {progress.done} units. Others work on the {progress.left} that are left."
        return message("Done for now", text, back=home(request) if progress.done else "")

    def unit(self, request: Request, annotator: Annotator) -> Response:
        """Show a unit that was assigned to the annotator before."""
        item = item_of(request, self.store)
        if not self.store.show_again(annotator.id, item.id):
            raise HTTPException(404)
        return self._page(request, annotator, item)

    def save(self, request: Request, annotator: Annotator, form: FormData) -> Response:
        item = item_of(request, self.store)
        if form.get("action") == "skip":
            self.store.skip(annotator.id, item.id)
            return redirect(home(request))
        try:
            self.store.save(annotator.id, item.id, read_label(form, item), str(form.get("post")))
        except IncompleteError as problem:
            return self._page(request, annotator, item, form, str(problem))
        except RefusedError as refused:
            return message("Not saved", str(refused), 409, link=home(request), link_text="Next unit")
        return redirect(f"{home(request)}?saved")

    def withdraw_latest(self, request: Request, annotator: Annotator, form: FormData) -> Response:
        item = self.store.withdraw_latest(annotator.id)
        return redirect(home(request) + ("" if item is None else f"/unit/{item}"))

    def _annotator(self, request: Request) -> Annotator:
        found = self.store.annotator(request.path_params["token"])
        if found is None:
            raise HTTPException(404)
        return found

    def _page(
        self,
        request: Request,
        annotator: Annotator,
        item: ProjectUnit,
        form: FormData | None = None,
        problem: str = "",
        notice: str = "",
    ) -> Response:
        label, progress = self.store.label(annotator.id, item.id), self.store.progress(annotator.id)
        before, after = self.store.neighbours(annotator.id, item.id)
        return unit_page(
            "label.html",
            item,
            item.order(annotator.id),
            label,
            form,
            problem,
            title=f"Unit {item.id}: label offers of help",
            heading=f"Unit {item.id}, as you labelled it" if label else f"Unit {item.id}",
            action=f"{home(request)}/unit/{item.id}",
            home=home(request),
            name=annotator.name,
            progress=progress,
            pace=_pace(progress.pace, progress.left),
            before=before,
            after=after,
            labelled=label is not None,
            notice=notice,
        )


def _pace(seconds: float | None, left: int) -> str:
    if seconds is None:
        return ""
    minutes = seconds * left / 60
    return f"{seconds:.{0 if seconds >= 10 else 1}f} s each" + (
        f", about {minutes:.0f} min to go" if minutes >= 1 else ""
    )
