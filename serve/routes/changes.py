"""Changes while a bundle is served: events, new and deleted items; and the comparison of variants."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from recsys_ray.core.clock import DAY
from recsys_ray.serving.requests import RequestError, check_moment
from serve import schemas
from serve.context import Context, json
from serve.live import Variant
from serve.routes.route import Route, needs
from serve.store import LiveEvent, LiveItem

_ITEM = "/v1/items/{item_id:path}"


def router(context: Context) -> APIRouter:
    made = APIRouter(route_class=Route, tags=["changes"])

    @made.post("/v1/events", response_model=schemas.EventsResponse, **needs("events"))
    async def events(asked: schemas.EventsRequest) -> Response:
        """Record user events. They are stored before this answer is sent, and the user's next request reflects them."""
        return json({"received": len(asked.events), "new": await keep_events(context, asked.events)})

    @made.put(_ITEM, response_model=schemas.ChangeResponse, responses={404: {}}, **needs("catalogue"))
    async def put_item(item_id: str, record: schemas.ItemRecord) -> Response:
        """Add an item, or change one. It can be recommended from the next answer on."""
        return json({"item_id": item_id, "change": await keep_item(context, item_id, record)})

    @made.delete(_ITEM, response_model=schemas.ChangeResponse, responses={404: {}}, **needs("catalogue"))
    async def delete_item(item_id: str) -> Response:
        """Remove an item from all further answers. An unknown item is not an error."""
        return json({"item_id": item_id, "change": await keep_item(context, item_id, None)})

    @made.get("/v1/variants", response_model=list[schemas.Variant], **needs("read"))
    async def variants(
        days: Annotated[schemas.Digits, Query(ge=1, le=366, description="number of past days to count")] = 7,
        window: Annotated[
            schemas.Digits,
            Query(ge=1, le=30 * DAY, description="maximum seconds between an answer and the event that follows it"),
        ] = DAY,
    ) -> Response:
        """How often a positive event follows an answer, by variant. Events name the answer by its request_id."""
        answers, now = context.live.answers, int(time.time()) + 1
        if not answers.variants:
            return json([])
        positives = [context.live.recommender.artifact.counts["default_event"]]
        counted = await context.run(partial(context.store.outcomes, now - days * DAY, now, positives, window))
        return json([_compared(one, *counted.get(one.name, (0, 0))) for one in answers.variants])

    return made


async def keep_events(context: Context, given: Sequence[schemas.UserEvent]) -> int:
    """The number of new events. Raises RequestError, or StoreError if there is no store or it does not answer."""
    counts, now = context.live.recommender.artifact.counts, int(time.time())
    events = [_event(one, place, counts, now) for place, one in enumerate(given)]
    new = await context.run(partial(context.store.add_events, events))
    context.metrics.events(len(events))
    return new


async def keep_item(context: Context, item_id: str, record: schemas.ItemRecord | None) -> int:
    """The number of the change; ``record`` None: the item is deleted. Raises as :func:`keep_events`."""
    store = context.store
    if record is None:
        return await context.run(partial(store.put_item, LiveItem(item_id, None)))
    types = context.live.recommender.item_types
    if record.item_type not in types:
        raise RequestError("item_type", f"there is no item type {record.item_type!r}; known: {', '.join(types)}")
    told = record.model_dump()
    vectors = await context.live.embed({"item_id": item_id, **told})
    return await context.run(partial(store.put_item, LiveItem(item_id, told, vectors)))


def _event(one: schemas.UserEvent, place: int, counts: Mapping[str, Any], now: int) -> LiveEvent:
    """Raises RequestError for an event or a time that cannot be."""
    event = one.event or counts["default_event"]
    field = f"events.{place}"
    if event not in counts["events"]:
        raise RequestError(f"{field}.event", f"there is no event {event!r}; known: {', '.join(counts['events'])}")
    moment = check_moment(one.timestamp, f"{field}.timestamp", now)
    name = one.event_id or uuid.uuid4().hex
    moment = now if moment is None else moment
    return LiveEvent(name, str(one.user_id), str(one.item_id), event, moment, one.request_id)


def _compared(variant: Variant, answers: int, followed: int) -> dict[str, Any]:
    low, high = wilson(followed, answers)
    rate = followed / answers if answers else None
    told = {"answers": answers, "followed": followed, "rate": rate, "low": low, "high": high}
    return {"variant": variant.name, "share": variant.share, **told}


def wilson(hits: int, of: int) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of a share (Wilson 1927); none where nothing was counted."""
    if not of:
        return None, None
    z, share = 1.959964, hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(middle - half, 0.0), min(middle + half, 1.0)
