"""Recommendations for users."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from recsys_ray.serving.requests import RequestError
from serve import schemas
from serve.context import Context, json
from serve.errors import details, wrong_field
from serve.live import Told
from serve.routes.route import Route, needs

_AT_ONCE = 64  # questions of a batch


def router(context: Context) -> APIRouter:
    made = APIRouter(route_class=Route, tags=["recommendations"])

    @made.post("/v1/recommendations", response_model=schemas.RecommendationResponse, **needs("read"))
    async def recommendations(asked: schemas.RecommendationRequest, request: Request) -> Response:
        """What a user should get next: by id, by an inline history, or by both."""
        told = await context.answer(asked.question())
        request.scope["bundle_version"], request.scope["answer"] = told.answer.version, told.request_id
        return json(_told(told))

    @made.post("/v1/recommendations:batch", response_model=schemas.BatchResponse, **needs("read"))
    async def batch(asked: schemas.BatchRequest, request: Request) -> Response:
        """Answers for up to 1,000 users. A question that cannot be answered has problem details in its place."""
        answers: list[Told | RequestError] = []
        for start in range(0, len(asked.questions), _AT_ONCE):  # others are answered in between
            part = [question.question() for question in asked.questions[start : start + _AT_ONCE]]
            answers += await context.run(partial(context.answers, part))
        return json({"answers": [_told_or_refused(answer, n, request) for n, answer in enumerate(answers)]})

    return made


def _told(told: Told) -> dict[str, Any]:
    said = {"request_id": told.request_id, "variant": told.variant, "degraded": told.degraded}
    return {**vars(told.answer), **said, "items": [vars(item) for item in told.answer.items]}


def _told_or_refused(answer: Told | RequestError, number: int, request: Request) -> dict[str, Any]:
    if isinstance(answer, RequestError):
        return details(request.scope, 422, None, [wrong_field(answer, "body", "questions", number)])
    return _told(answer)
