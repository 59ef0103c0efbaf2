"""Requests and responses of the HTTP API.

Unknown fields are refused, so that a misspelt one is not silently ignored. Types are those of JSON, with three
exceptions, which the OpenAPI lists too: an id may be a number, a time may be ISO 8601, a whole number may be 10.0.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from recsys_ray.serving.filters import Filters
from recsys_ray.serving.requests import MAX_K, iso_seconds
from serve.live import Asked

MANY = 10_000  # entries of a list that one request may carry
_NAMES = 100  # languages or categories of a filter
_QUESTIONS = 1_000  # of a batch
_LONG = 512  # characters of an id
_FAR = 2**53  # seconds: beyond it JSON's numbers are not whole everywhere


def _text(value: Any) -> Any:
    """Half of a surrogate pair is legal in JSON's escapes; nothing can store it."""
    if isinstance(value, str) and not value.isascii():
        value.encode()  # raises a ValueError
    return value


def _id(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _moment(value: Any) -> Any:
    try:
        return iso_seconds(value) if isinstance(value, str) else value
    except (ValueError, OverflowError):
        raise ValueError("Input should be unix seconds, or a time like 2024-05-01T12:00:00Z") from None


def _digits(value: Any) -> Any:
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise ValueError("Input should be a whole number")
    return value


_TEXT_OR_NUMBER = {"anyOf": [{"type": "string", "maxLength": _LONG}, {"type": "integer"}]}
_MOMENT = {"anyOf": [{"type": "number", "minimum": -_FAR, "maximum": _FAR}, {"type": "string", "format": "date-time"}]}
Text = Annotated[str, BeforeValidator(_text), Field(max_length=_LONG)]
Id = Annotated[str, BeforeValidator(_id), Field(max_length=_LONG), WithJsonSchema(_TEXT_OR_NUMBER)]
Moment = Annotated[float, BeforeValidator(_moment), Field(ge=-_FAR, le=_FAR), WithJsonSchema(_MOMENT)]
Whole = Annotated[int, BeforeValidator(_whole)]
Digits = Annotated[int, BeforeValidator(_digits)]  # in a query


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class HistoryEvent(_Strict):
    """One event of the user's history."""

    item_id: Id = Field(examples=["podcast-0001"])
    event: Text | None = Field(None, description="event name; default: the predicted event")
    timestamp: Moment | None = Field(
        None, description="unix seconds, or a time like 2024-05-01T12:00:00Z; default: now"
    )


class ItemFilter(_Strict):
    """What items must be; several fields must all hold."""

    languages: list[Text] = Field([], max_length=_NAMES, description="one of these")
    categories_any: list[Text] = Field([], max_length=_NAMES)
    categories_all: list[Text] = Field([], max_length=_NAMES)
    categories_none: list[Text] = Field([], max_length=_NAMES)
    published_after: Moment | None = Field(None, description="unix seconds or ISO 8601")
    published_before: Moment | None = Field(None, description="unix seconds or ISO 8601")

    def filters(self) -> Filters:
        return Filters(
            tuple(self.languages),
            tuple(self.categories_any),
            tuple(self.categories_all),
            tuple(self.categories_none),
            None if self.published_after is None else int(self.published_after),
            None if self.published_before is None else int(self.published_before),
        )


class RecommendationRequest(_Strict):
    """All fields are optional: nothing known about the user gives what is popular."""

    model_config = ConfigDict(
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
                    "filter": {"languages": ["en"], "categories_none": ["horror"]},
                },
            ]
        },
    )

    user_id: Id | None = Field(None, description="a user of the training data; an unknown id is a new user")
    history: list[HistoryEvent] = Field([], max_length=MANY, description="events in addition to those already known")
    age: float | None = Field(None, ge=0, le=130, description="years")
    country: Text | None = Field(None, description="as in the users table")
    tastes: dict[str, Annotated[list[float], Field(max_length=MANY)]] = Field(
        {}, max_length=_NAMES, description="taste vectors by column name of the users table"
    )
    item_types: list[Text] | None = Field(
        None, min_length=1, max_length=_NAMES, description="item types to recommend; default: all"
    )
    k: Whole = Field(10, ge=1, le=MAX_K, description="number of items")
    quotas: dict[str, Annotated[Whole, Field(ge=1, le=MAX_K)]] | None = Field(
        None,
        min_length=1,
        max_length=_NAMES,
        description="number of items per type, instead of the best k of all types",
    )
    exclude: list[Id] = Field([], max_length=MANY, description="item ids to leave out")
    allow: list[Id] | None = Field(None, max_length=MANY, description="only these item ids are allowed")
    filter: ItemFilter = Field(default_factory=ItemFilter)
    include_seen: bool = Field(False, description="include items that the user has seen")
    diversity: float = Field(0.0, ge=0, le=1, description="how much an item must differ from those above it")
    popularity: float = Field(0.0, ge=-1, le=1, description="above 0 raises popular items, below 0 lowers them")
    variant: Text | None = Field(
        None, description="this settings variant instead of the user's own; the answer is not counted for it"
    )

    def question(self) -> Asked:
        fields = dict(self)
        filters = fields.pop("filter").filters()
        return Asked(**fields | {"history": [dict(event) for event in self.history], "filters": filters})


class UserEvent(_Strict):
    """Something that a user did."""

    user_id: Id
    item_id: Id
    event: Text | None = Field(None, description="event name; default: the predicted event")
    timestamp: Moment | None = Field(
        None, description="unix seconds, or a time like 2024-05-01T12:00:00Z; default: now"
    )
    request_id: Text | None = Field(None, description="request_id of the answer that led to the event")
    event_id: Text | None = Field(None, min_length=1, description="a repeated event with the same id changes nothing")


class EventsRequest(_Strict):
    events: list[UserEvent] = Field(min_length=1, max_length=_QUESTIONS)


class EventsResponse(BaseModel):
    received: int
    new: int = Field(description="stored events, without those whose event_id was already known")


class ItemRecord(_Strict):
    """A new item, or the new state of one; columns as in the items table."""

    item_type: Text = Field(examples=["podcast"])
    title: Annotated[str, BeforeValidator(_text), Field(max_length=10_000)]
    description: Annotated[str, BeforeValidator(_text), Field(max_length=100_000)] | None = None
    language: Text | None = None
    categories: list[Text] = Field([], max_length=_NAMES)
    published_at: Whole | None = Field(None, ge=-_FAR, le=_FAR, description="unix seconds")
    available: bool = True
    hidden: bool = Field(False, description="never recommended")


class ChangeResponse(BaseModel):
    item_id: str
    change: int = Field(description="number of the change; every later answer reflects it")


class Variant(BaseModel):
    variant: str
    share: float = Field(description="of the users")
    answers: int
    followed: int = Field(description="answers followed by a positive event with their request_id")
    rate: float | None = Field(description="followed / answers")
    low: float | None = Field(description="bound of the 95 % interval (Wilson)")
    high: float | None


class BatchRequest(_Strict):
    """Up to 1,000 questions."""

    questions: list[RecommendationRequest] = Field(max_length=_QUESTIONS)


class WrongField(BaseModel):
    loc: list[str | int] = Field(examples=[["body", "history", 0, "item_id"]])
    msg: str
    type: str


class Problem(BaseModel):
    """What was wrong with a request: problem details of RFC 9457."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Unprocessable Entity"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["body.k: Input should be less than or equal to 500"])
    errors: list[WrongField] = Field(description="each problem and its location")
    request_id: str | None = Field(description="id of the refused request, as in the header x-request-id")


class Item(BaseModel):
    item_id: str
    item_type: str
    title: str
    score: float = Field(description="comparable within one answer")
    reason: str = Field(examples=['because you streamed "Title"'])
    because: str | None = Field(None, description="the history item that explains it best")


class RecommendationResponse(BaseModel):
    version: str = Field(description="bundle version that answered")
    request_id: str = Field(description="id of this answer; send it with events that follow")
    known: bool = Field(description="whether the user is in the training data")
    variant: str | None = Field(None, description="settings variant that answered, if several are compared")
    degraded: bool = Field(False, description="the event store did not answer; the answer comes from the bundle alone")
    cold: bool = Field(description="nothing is known about the user; these are popular items")
    ignored: list[str] = Field(description="history items of the request that the bundle does not know")
    items: list[Item] = Field(description="best first; without seen and excluded items unless requested")


class BatchResponse(BaseModel):
    answers: list[RecommendationResponse | Problem] = Field(description="in the order of the questions")


class ItemFacts(BaseModel):
    version: str
    item_id: str
    item_type: str
    title: str
    language: str | None
    categories: list[str]
    published_at: int | None = Field(description="unix seconds")
    available: bool


class FoundItem(BaseModel):
    item_id: str
    item_type: str
    title: str
    available: bool


class SearchResponse(BaseModel):
    version: str
    items: list[FoundItem] = Field(description="added items first, then the most popular")
    users: list[str] = Field(description="user ids")


class FilterNames(BaseModel):
    version: str
    languages: dict[str, int] = Field(description="languages with their numbers of items")
    categories: dict[str, int] = Field(description="categories with their numbers of items, the most frequent 1,000")


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
    recall: dict[str, float] = Field(description="recall of each index against exact search, lists of 10 and of 100")
    events: list[str] = Field(description="event names that a history may use")
    default_event: str = Field(description="the predicted event, which counts where none is named")
    store: bool = Field(description="whether events and changes of items are kept")
    countries: list[str]
    tastes: dict[str, int] = Field(description="taste vectors and their lengths")
    refused: str | None = Field(None, description="why the latest promoted or configured bundle is not served")


class Promotion(_Strict):
    version: str = Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", examples=["20240501-0a1b2c3d4e5f"])
    force: bool = Field(False, description="accept a bundle that answers otherwise; a damaged one stays refused")


class Promoted(BaseModel):
    promoted: str = Field(description="the version that is to be served; /v1/version names the one that answers")
    before: str | None


class PastEvent(BaseModel):
    item_id: str
    item_type: str
    title: str
    event: str
    timestamp: int


class History(BaseModel):
    user_id: str
    history: list[PastEvent] = Field(description="newest first")
    degraded: bool = Field(description="the event store did not answer; these come from the bundle alone")
