"""What is known about users."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Response

from recsys_ray.serving.recommender import Recommender
from serve import schemas
from serve.context import Context, json
from serve.live import LiveAnswers
from serve.routes.items import facts_of
from serve.routes.route import Route, needs
from serve.store import StoreError


def router(context: Context) -> APIRouter:
    made = APIRouter(route_class=Route, tags=["users"])

    @made.get("/v1/users/{user_id:path}/history", response_model=schemas.History, **needs("read"))
    async def history(user_id: str, limit: Annotated[schemas.Digits, Query(ge=1, le=1_000)] = 20) -> Response:
        """The user's latest events, those in the store and those in the bundle; none for an unknown user."""
        fresh, degraded = await context.ask(
            lambda recommender: _fresh(context.live.answers, recommender, user_id, limit)
        )
        past = await context.run(partial(context.live.recommender.history, user_id, limit))
        told = [vars(event) for event in [*fresh, *past][:limit]]
        return json({"user_id": user_id, "history": told, "degraded": degraded})

    @made.get("/v1/examples", **needs("read"))
    async def examples() -> list[schemas.History]:
        """A few users to try, with their latest events; empty where the server does not show users."""
        if not context.live.examples:
            return []
        recommender = context.live.recommender
        return [
            schemas.History(
                user_id=user_id,
                degraded=False,
                history=[schemas.PastEvent(**vars(event)) for event in recommender.history(user_id)],
            )
            for user_id in recommender.example_users(8)
        ]

    return made


def _fresh(
    answers: LiveAnswers, recommender: Recommender, user_id: str, limit: int
) -> tuple[list[schemas.PastEvent], bool]:
    """The events in the store, newest first, of items that are still there; and whether the store did not answer."""
    if answers.store is None:
        return [], False
    try:
        kept = answers.store.events_of([user_id], recommender.artifact.counts["end"], limit).get(user_id, [])
    except StoreError:
        return [], True
    found = []
    for one in reversed(kept):
        if recommender.find(one.item_id) is not None:
            facts = facts_of(recommender, one.item_id)
            what = {"item_id": one.item_id, "item_type": facts["item_type"], "title": facts["title"]}
            found.append(schemas.PastEvent(**what, event=one.event, timestamp=one.timestamp))
    return found, False
