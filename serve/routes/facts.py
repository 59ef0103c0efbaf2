"""Health, the served bundle, what can be found in it, and the web page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import HTMLResponse

from serve import schemas
from serve.context import Context, json
from serve.routes.route import Route, needs

_PAGE = Path(__file__).parents[1] / "page.html"
_MANY = 1_000  # languages, and categories, that filters offer


def router(context: Context) -> APIRouter:
    made = APIRouter(route_class=Route, tags=["facts"])
    page = _PAGE.read_text(encoding="utf-8")
    headers = _page_headers(page)

    @made.get("/healthz")
    async def healthz() -> schemas.Health:
        """Answers once a bundle is loaded."""
        return schemas.Health(status="ok", version=context.live.recommender.version)

    @made.get("/v1/version", **needs("read"))
    async def version() -> schemas.Version:
        """Which bundle answers, and what it holds."""
        recommender = context.live.recommender
        counts = dict(recommender.artifact.counts)
        names = ("version", "items", "items_per_type", "users", "events", "default_event", "countries")
        facts = {name: counts[name] for name in names} | {
            "recall": {one.name: one.recall for one in recommender.indexes}
        }
        store = context.live.answers.store is not None
        return schemas.Version(**facts, tastes=recommender.tower.tastes, store=store, refused=context.live.refused)

    @made.get("/v1/filters", response_model=schemas.FilterNames, **needs("read"))
    async def filters() -> Response:
        """Languages and categories that a filter may name, most items first."""
        recommender = context.live.recommender
        languages, categories = (recommender.facts.common(kind, _MANY) for kind in ("language", "category"))
        return json({"version": recommender.version, "languages": languages, "categories": categories})

    @made.get("/v1/search", response_model=schemas.SearchResponse, **needs("read"))
    async def search(
        q: schemas.Text,
        kind: Annotated[Literal["item", "user"] | None, Query(description="default: both")] = None,
        limit: Annotated[schemas.Digits, Query(ge=1, le=50)] = 10,
    ) -> Response:
        """Items by words of title or id, as they are typed; users by the beginning of their ids, or by the whole id
        where the server does not show users."""
        recommender = await context.ask(lambda current: current)
        items = [] if kind == "user" else await asyncio.to_thread(recommender.search, q, limit)
        users: list[str] = []
        if kind != "item" and q:
            if context.live.examples:
                users = recommender.users.beginning(q, limit)
            elif recommender.users.find(q) is not None:
                users = [q]
        return json({"version": recommender.version, "items": [vars(item) for item in items], "users": users})

    @made.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return made


def _page_headers(page: str) -> dict[str, str]:
    """Nothing but the page's own script and style runs, whatever the texts that it shows contain."""
    script, style = (_hash_of(page, tag) for tag in ("script", "style"))
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


def _hash_of(page: str, tag: str) -> str:
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
