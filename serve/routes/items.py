"""Items: details, similar items, and popular items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from recsys_ray.serving.filters import Filters
from recsys_ray.serving.recommender import Recommender
from recsys_ray.serving.requests import MAX_K, UnknownItem
from serve import schemas
from serve.context import Context, json
from serve.routes.route import Route, needs

_K = Annotated[schemas.Digits, Query(ge=1, le=MAX_K)]
_TYPES = Annotated[
    list[schemas.Text] | None, Query(max_length=100, description="repeat the parameter for several types")
]
_NAMES = Annotated[list[schemas.Text], Query(max_length=100, description="repeat for several")]

_SECONDS = Annotated[schemas.Digits | None, Query(ge=0, le=2**53, description="unix seconds")]


def router(context: Context) -> APIRouter:
    made = APIRouter(route_class=Route, tags=["items"])

    @made.get(
        "/v1/items/{item_id:path}/similar", response_model=schemas.SimilarResponse, responses={404: {}}, **needs("read")
    )
    async def similar(item_id: str, k: _K = 10, item_type: _TYPES = None) -> Response:
        """Items like this one. Percent-encode the id; slashes may stay."""
        return json(await context.ask(lambda r: _listed(r, r.similar(item_id, k, item_type))))

    @made.get("/v1/items/{item_id:path}", response_model=schemas.ItemFacts, responses={404: {}}, **needs("read"))
    async def item(item_id: str) -> Response:
        """What the bundle knows of an item. Percent-encode the id; slashes may stay."""
        return json(await context.ask(lambda r: {"version": r.version, **facts_of(r, item_id)}))

    @made.get("/v1/popular", response_model=schemas.SimilarResponse, **needs("read"))
    async def popular(
        k: _K = 10,
        item_type: _TYPES = None,
        country: schemas.Text = "",
        language: _NAMES = [],  # noqa: B006 - FastAPI copies it
        category: _NAMES = [],  # noqa: B006
        category_all: _NAMES = [],  # noqa: B006
        category_none: _NAMES = [],  # noqa: B006
        published_after: _SECONDS = None,
        published_before: _SECONDS = None,
    ) -> Response:
        """What is popular, for everyone or in a country, with the filters of a recommendation."""
        names = (tuple(language), tuple(category), tuple(category_all), tuple(category_none))
        filters = Filters(*names, published_after, published_before)
        return json(await context.ask(lambda r: _listed(r, r.popular(k, item_type, country or None, filters))))

    return made


def facts_of(recommender: Recommender, item_id: str) -> dict[str, Any]:
    """As schemas.ItemFacts. Raises UnknownItem."""
    gid = recommender.find(item_id)
    if gid is None:
        raise UnknownItem("item_id", f"there is no item {item_id!r}")
    if (state := recommender.live.get(gid)) is not None:
        return {**vars(state), "item_type": recommender.item_types[state.ntype], "categories": list(state.categories)}
    language, categories, published = recommender.facts.of(gid)
    return {
        "item_id": item_id,
        "item_type": recommender.items.type(gid),
        "title": recommender.items.title(gid),
        "language": language,
        "categories": categories,
        "published_at": published,
        "available": bool(recommender.items.available[gid]),
    }


def _listed(recommender: Recommender, items: Sequence[Any]) -> dict[str, Any]:
    return {"version": recommender.version, "items": [vars(item) for item in items]}
