"""Requests and responses of the HTTP API. Unknown fields are refused: a misspelt one must not be ignored."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from recsys_ray.serving.requests import MAX_K

_MANY = 10_000  # entries of a list that one request may carry


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class HistoryEvent(_Strict):
    """One event of the user's history."""

    item_id: str = Field(examples=["podcast-0001"])
    event: str | None = Field(None, description="name of the event; left out: the event that is predicted")
    timestamp: float | None = Field(None, description="unix seconds; left out: just now")


class RecommendationRequest(_Strict):
    """All fields are optional: nothing known about the user gives what is popular."""

    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {"user_id": "user-000001", "k": 10},
                {
                    "history": [{"item_id": "podcast-0001", "event": "stream", "timestamp": 1_700_000_000}],
                    "age": 31,
                    "country": "SE",
                    "item_types": ["audiobook"],
                    "k": 5,
                    "exclude": ["audiobook-0007"],
                },
            ]
        },
    )

    user_id: str | None = Field(None, description="a user of the training data; any other is a new user")
    history: list[HistoryEvent] = Field([], max_length=_MANY, description="events beside those already known")
    age: float | None = Field(None, ge=0, le=130, description="years")
    country: str | None = Field(None, description="as in the users table")
    tastes: dict[str, list[float]] = Field({}, description="taste vectors of other domains, by column name")
    item_types: list[str] | None = Field(None, min_length=1, description="types to recommend; left out: all")
    k: int = Field(10, ge=1, le=MAX_K, description="how many items")
    exclude: list[str] = Field([], max_length=_MANY, description="item ids that must not come")

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of ``Recommender.answer``."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        fields["history"] = [{"item_id": e.item_id, "event": e.event, "timestamp": e.timestamp} for e in self.history]
        return fields


class Item(BaseModel):
    item_id: str
    item_type: str
    title: str
    score: float = Field(description="comparable inside one answer")
    reason: str = Field(examples=['because you streamed "Title"'])


class RecommendationResponse(BaseModel):
    version: str = Field(description="version of the bundle that answered")
    known: bool = Field(description="whether the user is in the training data")
    items: list[Item] = Field(description="best first; never one that the user has seen or that was excluded")


class SimilarResponse(BaseModel):
    version: str
    items: list[Item] = Field(description="nearest first")


class Health(BaseModel):
    status: str = Field(examples=["ok"])
    version: str


class Version(BaseModel):
    version: str
    items: int
    items_per_type: dict[str, int]
    users: int
    recall_at_10: dict[str, float] = Field(description="of each index against exact search")
    events: list[str] = Field(description="names that a history may use")
    countries: list[str]
    tastes: dict[str, int] = Field(description="taste vectors and their sizes")
    refused: str | None = Field(None, description="why the bundle that was configured last is not the one that answers")


class PastEvent(BaseModel):
    item_id: str
    item_type: str
    title: str
    event: str
    timestamp: int


class ExampleUser(BaseModel):
    user_id: str
    history: list[PastEvent]


class Problem(BaseModel):
    loc: list[str | int] = Field(examples=[["body", "history", 0, "item_id"]])
    msg: str
    type: str


class Problems(BaseModel):
    """What was wrong with a request."""

    detail: list[Problem]
