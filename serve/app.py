"""The HTTP API over one recommender. Knows nothing of Ray: ``create_app`` is tested without it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse

from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import MAX_K, RequestError, UnknownItem
from serve import schemas

Answer = TypeVar("Answer")
_PAGE = Path(__file__).with_name("page.html")
_REFUSALS: dict[int | str, dict[str, Any]] = {422: {"model": schemas.Problems, "description": "names the field"}}


class Live(Protocol):
    """Where the app finds the recommender of the moment: it may be swapped between two requests."""

    @property
    def recommender(self) -> Recommender: ...

    @property
    def refused(self) -> str | None: ...

    @property
    def examples(self) -> bool: ...


def create_app(live: Live) -> FastAPI:
    """All routes. Answers are computed one after the other on a thread of their own, while the event loop goes on
    accepting requests: only so are those that wait counted, by which Serve adds replicas and refuses with 429."""
    app = FastAPI(
        title="recsys-ray",
        version="1",
        description="What should this user get next?",
        separate_input_output_schemas=False,
    )
    _add_errors(app)
    _add_answers(app, live, ThreadPoolExecutor(1, "answers"))
    _add_facts(app, live)
    return app


def _add_answers(app: FastAPI, live: Live, thread: Executor) -> None:
    async def compute(function: Callable[..., Answer], *args: Any, **named: Any) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(thread, partial(function, *args, **named))

    @app.post("/v1/recommendations", response_model=schemas.RecommendationResponse, responses=_REFUSALS)
    async def recommendations(request: schemas.RecommendationRequest) -> JSONResponse:
        """What a user should get next: by id, by an inline history, or by both."""
        answer = await compute(live.recommender.answer, **request.arguments())
        items = [vars(item) for item in answer.items]
        return JSONResponse({"version": answer.version, "known": answer.known, "items": items})

    missing: dict[int | str, dict[str, Any]] = {
        404: {"model": schemas.Problems, "description": "there is no such item"}
    }

    @app.get(
        "/v1/items/{item_id:path}/similar", response_model=schemas.SimilarResponse, responses={**_REFUSALS, **missing}
    )
    async def similar(
        item_id: str,
        k: Annotated[int, Query(ge=1, le=MAX_K)] = 10,
        item_type: Annotated[list[str] | None, Query(description="repeat for several types")] = None,
    ) -> JSONResponse:
        """Items like this one. Percent-encode the id; slashes may stay."""
        recommender = live.recommender
        items = [vars(item) for item in await compute(recommender.similar, item_id, k, item_type)]
        return JSONResponse({"version": recommender.version, "items": items})


def _add_facts(app: FastAPI, live: Live) -> None:
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/healthz")
    async def healthz() -> schemas.Health:
        """Answers once a bundle is loaded."""
        return schemas.Health(status="ok", version=live.recommender.version)

    @app.get("/v1/version")
    async def version() -> schemas.Version:
        """Which bundle answers, and what it holds."""
        recommender = live.recommender
        counts = dict(recommender.artifact.counts)
        names = ("version", "items", "items_per_type", "users", "recall_at_10", "events", "countries")
        facts = {name: counts[name] for name in names}
        return schemas.Version(**facts, tastes=recommender.tower.tastes, refused=live.refused)

    @app.get("/v1/examples")
    async def examples() -> list[schemas.ExampleUser]:
        """A few users to try, with their latest events; empty where the server does not show users."""
        if not live.examples:
            return []
        recommender = live.recommender
        return [
            schemas.ExampleUser(
                user_id=user_id,
                history=[schemas.PastEvent(**vars(event)) for event in recommender.history(user_id)],
            )
            for user_id in recommender.example_users(8)
        ]

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)


def _add_errors(app: FastAPI) -> None:
    """Every refusal has FastAPI's form: ``detail`` is a list of {loc, msg, type}. The input is not repeated: it may
    hold what JSON cannot carry."""

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> JSONResponse:
        place = "body" if request.method == "POST" else "path" if isinstance(error, UnknownItem) else "query"
        field = error.field.replace("item_types", "item_type") if place == "query" else error.field
        loc = [place, *(int(part) if part.isdigit() else part for part in field.split("."))]
        kind = "not_found" if isinstance(error, UnknownItem) else "value_error"
        return _problems(404 if isinstance(error, UnknownItem) else 422, [(loc, error.sentence, kind)])

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return _problems(422, [(problem["loc"], problem["msg"], problem["type"]) for problem in error.errors()])


def _problems(status: int, problems: Sequence[tuple[Sequence[str | int], str, str]]) -> JSONResponse:
    detail = [
        {"loc": [_text(part) if isinstance(part, str) else part for part in loc], "msg": _text(message), "type": kind}
        for loc, message, kind in problems
    ]
    return JSONResponse({"detail": detail}, status_code=status)


def _text(text: str) -> str:
    """Half of a surrogate pair is legal in JSON's escapes and illegal in UTF-8."""
    return text.encode("utf-8", "replace").decode()
