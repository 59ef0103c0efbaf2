"""The first and last code to touch a request: assigns its id and limits its size and time."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import Refused, problem
from serve.logs import failed, told
from serve.metrics import Metrics

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~-]{1,128}")


@dataclass(frozen=True)
class Gate:
    """ASGI middleware. Ray Serve gives each request an id where it brings none, and answers carry it.

    Args:
        max_body: maximum bytes of a body; larger ones get 413.
        timeout: seconds before a request gets 503.
        metrics: receives each request.
    """

    app: ASGIApp
    max_body: int
    timeout: float
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope["request_id"] = name
        began = time.perf_counter()
        status = read = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def body() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise self._too_large()
            return message

        try:
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > self.max_body:
                raise self._too_large()
            async with asyncio.timeout(self.timeout):
                await self.app(scope, body, answer)
        except Refused as refused:
            if status:
                raise
            await problem(scope, refused.status_code, refused.detail)(scope, receive, answer)
        except TimeoutError:
            if status:
                raise
            late = problem(scope, 503, f"no answer within {self.timeout:g} s", headers={"Retry-After": "1"})
            await late(scope, receive, answer)
        except Exception as error:
            failed(name, error)
            if status:
                raise
            await problem(scope, 500, "internal error; see the server log")(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - began
            told(scope, status, seconds)
            self.metrics.request(scope.get("route_path", "none"), scope["method"], status, seconds)

    def _too_large(self) -> Refused:
        return Refused(413, f"a request body may have at most {self.max_body} bytes")
