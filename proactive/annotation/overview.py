"""The pages of a project's owner: progress, annotators with their links, agreement, and ties to adjudicate."""

from collections.abc import Callable

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from datamodules.corpus.agreement import interval
from datamodules.errors import UserError
from proactive.annotation.agreement_by_group import agreement_figures, votes_of_project
from proactive.annotation.pages import IncompleteError, endpoint, home, item_of, page, read_label, redirect, unit_page
from proactive.annotation.store import Store


class Overview:
    """The pages below /o/TOKEN.

    Args:
        store: The project.
        has_traces: Whether the server also shows traces.
        is_owner: Raises if the token of a request is not the owner's.
    """

    def __init__(self, store: Store, has_traces: bool, is_owner: Callable[[Request], None]) -> None:
        self.store, self.has_traces, self.is_owner = store, has_traces, is_owner

    def routes(self) -> list[Route]:
        adjudicate = "/o/{token}/adjudicate/{item:int}"
        return [
            Route("/o/{token}", endpoint(self.is_owner, self.overview)),
            Route("/o/{token}/agreement", endpoint(self.is_owner, self.agreement)),
            Route("/o/{token}/invite", endpoint(self.is_owner, self.invite), methods=["POST"]),
            Route(adjudicate, endpoint(self.is_owner, self.unit)),
            Route(adjudicate, endpoint(self.is_owner, self.adjudicate), methods=["POST"]),
        ]

    def overview(self, request: Request, _: None, problem: str = "", link: str = "", link_name: str = "") -> Response:
        return page(
            "overview.html",
            422 if problem else 200,
            home=home(request),
            reads=self.has_traces,
            problem=problem,
            link=link,
            link_name=link_name,
            name=self.store.path.name,
            states=self.store.states(),
            wanted=self.store.annotators_per_unit,
            ties=self.store.ties(),
            annotators=[(one, self.store.progress(one.id)) for one in self.store.annotators()],
        )

    def agreement(self, request: Request, _: None) -> Response:
        figures = agreement_figures(votes_of_project(self.store))
        return page(
            "agreement.html",
            home=home(request),
            figures={
                group: [found["units"], *(interval(found, name) for name in ("raw", "alpha", "kappa"))]
                for group, found in figures.items()
                if found["units"]
            },
        )

    def invite(self, request: Request, _: None, form: FormData) -> Response:
        name = str(form.get("name", ""))
        try:
            token = self.store.invite(name)
        except UserError as error:
            return self.overview(request, None, problem=f"{error.what}. {error.hint}")
        return self.overview(request, None, link=f"{request.base_url}a/{token}", link_name=name)

    def unit(self, request: Request, _: None, form: FormData | None = None, problem: str = "") -> Response:
        item = item_of(request, self.store)
        labels = self.store.labels(item.id)
        return unit_page(
            "adjudicate.html",
            item,
            range(len(item.unit.offers)),
            next((one.label for one in labels if one.annotator is None), None),
            form,
            problem,
            [one for one in labels if one.annotator is not None],
            title=f"Adjudicate unit {item.id}",
            heading=f"Adjudicate unit {item.id}",
            action=f"{home(request)}/adjudicate/{item.id}",
            home=home(request),
            ties=len(self.store.ties()),
            trace=item.unit.trace,
            step=item.step,
        )

    def adjudicate(self, request: Request, _: None, form: FormData) -> Response:
        item = item_of(request, self.store)
        try:
            self.store.adjudicate(item.id, read_label(form, item), str(form.get("post")))
        except IncompleteError as problem:
            return self.unit(request, None, form, str(problem))
        ties = self.store.ties()
        return redirect(home(request) + (f"/adjudicate/{ties[0]}" if ties else ""))
