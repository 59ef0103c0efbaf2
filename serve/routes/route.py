"""What every route does before its own work."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from serve.errors import Refused
from serve.security import Scope

_JSON = re.compile(r"application/([a-z0-9.-]+\+)?json\s*(;|$)", re.IGNORECASE)


def needs(scope: Scope) -> dict[str, Any]:
    """Further arguments of a route for callers with ``scope``; errors.py makes OpenAPI's ``security`` of it."""
    return {"openapi_extra": {"x-scope": scope}}


class Route(APIRoute):
    """Checks the caller's permission (``needs``), and that a body is JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, has_body = super().get_route_handler(), self.body_field is not None
        scope = (self.openapi_extra or {}).get("x-scope")

        async def guarded(request: Request) -> Response:
            request.scope["route_path"] = self.path
            if scope is not None:
                await request.app.state.guard.admit(request, scope)
            if has_body and not _JSON.match(request.headers.get("content-type", "")):
                raise Refused(415, "send the body as application/json")
            return await handle(request)

        return guarded
