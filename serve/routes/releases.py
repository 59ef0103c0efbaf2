"""Promotion of bundles, and the way back."""

from __future__ import annotations

from fastapi import APIRouter, Response

from recsys_ray.core.errors import UserError
from serve import schemas
from serve.context import Context, json
from serve.errors import Refused
from serve.routes.route import Route, needs


def router(context: Context) -> APIRouter:
    made = APIRouter(route_class=Route, tags=["releases"])

    @made.post("/v1/promote", response_model=schemas.Promoted, responses={409: {}}, **needs("promote"))
    async def promote(asked: schemas.Promotion) -> Response:
        """Serve another bundle of the folder. It is compared with the live one first; then every replica loads it
        beside the live one and swaps, within seconds. A bundle that is damaged or worse is refused."""
        try:
            now, before = await context.live.promote(asked.version, asked.force)
        except UserError as error:
            raise Refused(409, str(error)) from None
        return json({"promoted": now, "before": before})

    @made.post("/v1/rollback", response_model=schemas.Promoted, responses={409: {}}, **needs("promote"))
    async def rollback() -> Response:
        """Serve what was served before the last promotion."""
        try:
            now, before = await context.live.rollback()
        except UserError as error:
            raise Refused(409, str(error)) from None
        return json({"promoted": now, "before": before})

    return made
