"""Gorse's routes and field names over the same answers, for clients written for Gorse.

Feedback types are the bundle's event names. A new item needs an item type: a label ``{"item_type": ...}``, or a
category that names one; ``Comment`` is its title, and its other labels are its description. Not supported: users, lists
of items and feedback, changes of single fields, and ``write-back-delay``.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from recsys_ray.serving.answers import Recommendation
from recsys_ray.serving.filters import Filters
from recsys_ray.serving.requests import MAX_K, Question, RequestError
from serve import schemas
from serve.context import Context, json
from serve.routes.changes import keep_events, keep_item
from serve.routes.items import facts_of
from serve.routes.route import Route, needs

_N = Annotated[schemas.Digits, Query(ge=1, le=MAX_K)]
_OFFSET = Annotated[schemas.Digits, Query(ge=0, le=MAX_K - 1)]
_Labels = list[schemas.Text] | dict[str, schemas.Text | list[schemas.Text]] | None


class _Gorse(BaseModel):
    """Fields that only Gorse knows are passed over."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Feedback(_Gorse):
    FeedbackType: schemas.Text
    UserId: schemas.Text
    ItemId: schemas.Text
    Timestamp: schemas.Moment | None = Field(None, description="default: now")

    def event(self, overwrite: bool) -> schemas.UserEvent:
        """Gorse knows feedback by type, user and item: a repeat changes nothing, unless it is to overwrite."""
        key = [self.FeedbackType, self.UserId, self.ItemId, *([str(self.Timestamp)] if overwrite else [])]
        return schemas.UserEvent(
            event_id=hashlib.sha256("\x1f".join(key).encode()).hexdigest(),
            user_id=self.UserId,
            item_id=self.ItemId,
            event=self.FeedbackType,
            timestamp=self.Timestamp,
        )


class GorseItem(_Gorse):
    ItemId: schemas.Text = Field(min_length=1)
    IsHidden: bool = False
    Categories: list[schemas.Text] | None = Field(None, max_length=100)
    Timestamp: schemas.Moment | None = Field(None, description="publication time")
    Labels: _Labels = Field(None, max_length=100)
    Comment: schemas.Text = Field("", description="the title")

    def record(self, types: list[str]) -> schemas.ItemRecord:
        """Raises RequestError if the item type is unclear."""
        labels = self.Labels or {}
        named = labels.get("item_type") if isinstance(labels, dict) else None
        kinds = [named] if named else [name for name in self.Categories or () if name in types]
        if not kinds and len(types) == 1:
            kinds = types
        if not kinds or kinds[0] not in types:
            raise RequestError("Labels", f"name one of the item types {', '.join(types)} as Labels.item_type")
        said = labels if isinstance(labels, list) else [v for name, v in labels.items() if name != "item_type"]
        words = [word for value in said for word in ([value] if isinstance(value, str) else value)]
        return schemas.ItemRecord(
            item_type=kinds[0],
            title=self.Comment or self.ItemId,
            description=", ".join(words) or None,
            categories=self.Categories or [],
            published_at=None if self.Timestamp is None else int(self.Timestamp),
            hidden=self.IsHidden,
        )


_Many = Annotated[list[Feedback], Body(min_length=1, max_length=1_000)]


class RowAffected(BaseModel):
    RowAffected: int


class Score(BaseModel):
    Id: str
    Score: float


class GorseFacts(BaseModel):
    ItemId: str
    IsHidden: bool
    Categories: list[str]
    Timestamp: str
    Labels: dict[str, str]
    Comment: str


def router(context: Context) -> APIRouter:
    made = APIRouter(route_class=Route, tags=["gorse"], prefix="/api")

    async def feedback(asked: list[Feedback], overwrite: bool) -> Response:
        return json({"RowAffected": await keep_events(context, [one.event(overwrite) for one in asked])})

    @made.post("/feedback", response_model=RowAffected, **needs("events"))
    async def post_feedback(asked: _Many) -> Response:
        """What users did; a repeat of type, user and item changes nothing."""
        return await feedback(asked, overwrite=False)

    @made.put("/feedback", response_model=RowAffected, **needs("events"))
    async def put_feedback(asked: _Many) -> Response:
        """What users did; a repeat at another time counts again."""
        return await feedback(asked, overwrite=True)

    @made.post("/item", response_model=RowAffected, **needs("catalogue"))
    async def post_item(asked: GorseItem) -> Response:
        """Add an item, or change one."""
        await keep_item(context, asked.ItemId, asked.record(context.live.recommender.item_types))
        return json({"RowAffected": 1})

    @made.get("/item/{item_id}", response_model=GorseFacts, responses={404: {}}, **needs("read"))
    async def get_item(item_id: str) -> Response:
        """An item's details."""
        found = await context.ask(lambda recommender: facts_of(recommender, item_id))
        moment = datetime.fromtimestamp(found["published_at"] or 0, UTC)
        told = {"ItemId": item_id, "IsHidden": not found["available"], "Categories": found["categories"]}
        told |= {"Labels": {"item_type": found["item_type"]}, "Comment": found["title"]}
        return json(told | {"Timestamp": moment.isoformat()})

    @made.delete("/item/{item_id}", response_model=RowAffected, responses={404: {}}, **needs("catalogue"))
    async def delete_item(item_id: str) -> Response:
        """Take an item out of all answers."""
        await keep_item(context, item_id, None)
        return json({"RowAffected": 1})

    @made.get("/item/{item_id}/neighbors", response_model=list[Score], responses={404: {}}, **needs("read"))
    async def neighbors(item_id: str, n: _N = 10, offset: _OFFSET = 0) -> Response:
        """Items like this one."""
        wanted = _many(n, offset)
        return json(_scores(await context.ask(lambda recommender: recommender.similar(item_id, wanted)), offset))

    @made.get(
        "/recommend/{user_id}/{category}", response_model=list[str] | list[Score], responses={404: {}}, **needs("read")
    )
    async def recommend_category(
        user_id: str,
        category: str,
        n: _N = 10,
        offset: _OFFSET = 0,
        write_back_type: Annotated[schemas.Text, Query(alias="write-back-type")] = "",
        x_api_version: Annotated[schemas.Text, Header()] = "",
    ) -> Response:
        """What a user should get next: ids, or with ``X-API-Version: 2`` ids and scores."""
        asked = Question(user_id, k=_many(n, offset), filters=_filters(category))
        items = (await context.answer(asked)).answer.items[offset:]
        if write_back_type:  # what is shown counts as this event, and does not come again
            shown = [schemas.UserEvent(user_id=user_id, item_id=item.item_id, event=write_back_type) for item in items]
            await keep_events(context, shown)
        return json(_scores(items) if x_api_version == "2" else [item.item_id for item in items])

    @made.get("/recommend/{user_id}/", include_in_schema=False, **needs("read"))
    @made.get("/recommend/{user_id}", response_model=list[str] | list[Score], responses={404: {}}, **needs("read"))
    async def recommend(
        user_id: str,
        n: _N = 10,
        offset: _OFFSET = 0,
        category: schemas.Text = "",
        write_back_type: Annotated[schemas.Text, Query(alias="write-back-type")] = "",
        x_api_version: Annotated[schemas.Text, Header()] = "",
    ) -> Response:
        """What a user should get next: ids, or with ``X-API-Version: 2`` ids and scores."""
        return await recommend_category(user_id, category, n, offset, write_back_type, x_api_version)

    @made.post("/session/recommend", response_model=list[Score], **needs("read"))
    async def session(asked: _Many, n: _N = 10) -> Response:
        """Recommendations for a user of whom only this feedback is known; it is not stored."""
        history = [{"item_id": o.ItemId, "event": o.FeedbackType, "timestamp": o.Timestamp} for o in asked]
        return json(_scores((await context.answer(Question(history=history, k=n))).answer.items))

    return made


def _many(n: int, offset: int) -> int:
    if n + offset > MAX_K:
        raise RequestError("n", f"n and offset may add up to at most {MAX_K}")
    return n + offset


def _filters(category: str) -> Filters:
    return Filters(categories_any=(category,)) if category else Filters()


def _scores(items: list[Recommendation], offset: int = 0) -> list[dict[str, Any]]:
    return [{"Id": item.item_id, "Score": item.score} for item in items[offset:]]
