"""Errors as problem details (RFC 9457): ``application/problem+json``, with a list of the problems as ``errors``.

``errors`` has {loc, msg, type} for each field, named as FastAPI names them. The input is not repeated: it may contain
values that JSON cannot represent, and user ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from recsys_ray.serving.requests import RequestError, UnknownItem
from serve import schemas
from serve.store import StoreError

MEDIA_TYPE = "application/problem+json"
Wrong = tuple[Sequence[str | int], str, str]  # loc, msg, type
_EXAMPLES: dict[int, tuple[str, list[dict[str, Any]]]] = {
    400: ("the body is not JSON", [{"loc": ["body", 1], "msg": "JSON decode error", "type": "json_invalid"}]),
    401: ("send a key: Authorization: Bearer KEY, or X-API-Key: KEY", []),
    403: ("this key lacks the scope 'events'", []),
    404: (
        "there is no item 'x'",
        [{"loc": ["path", "item_id"], "msg": "there is no item 'x'", "type": "not_found"}],
    ),
    409: ("this server serves one bundle, not a folder of bundles", []),
    413: ("a request body may have at most 1048576 bytes", []),
    415: ("send the body as application/json", []),
    422: (
        "k: Input should be less than or equal to 500",
        [{"loc": ["body", "k"], "msg": "Input should be less than or equal to 500", "type": "less_than_equal"}],
    ),
    429: ("rate limit of 100 per 1 second exceeded; wait", []),
    503: ("the store does not answer; try again", []),
}


class Refused(HTTPException):
    """Ends a request with a status and a sentence."""


def wrong_field(error: RequestError, *place: str | int) -> Wrong:
    """``place``: where the question is, say body."""
    field = error.field.replace("item_types", "item_type") if place == ("query",) else error.field
    loc = [*place, *(int(part) if part.isdigit() else part for part in field.split("."))]
    return loc, error.sentence, "not_found" if isinstance(error, UnknownItem) else "value_error"


def problem(
    scope: Mapping[str, Any],
    status: int,
    detail: str | None = None,
    errors: Iterable[Wrong] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer to a request that is refused; arguments as :func:`details`."""
    return JSONResponse(details(scope, status, detail, errors), status, dict(headers or {}), MEDIA_TYPE)


def details(
    scope: Mapping[str, Any], status: int, detail: str | None = None, errors: Iterable[Wrong] = ()
) -> dict[str, Any]:
    """Problem details. ``scope`` is the request's, for its id; without ``detail`` they tell the first errors."""
    listed = [
        {"loc": [_text(part) if isinstance(part, str) else part for part in loc], "msg": _text(message), "type": kind}
        for loc, message, kind in errors
    ]
    if detail is None:
        detail = "; ".join(
            f"{'.'.join(map(str, wrong['loc'][1:] or wrong['loc']))}: {wrong['msg']}" for wrong in listed[:3]
        )
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": _text(detail),
        "errors": listed,
        "request_id": scope.get("request_id"),
    }


def _text(text: str) -> str:
    """Half of a surrogate pair is legal in JSON's escapes and illegal in UTF-8."""
    return text.encode("utf-8", "replace").decode()


def add_handlers(app: FastAPI) -> None:
    """Every refusal and failure of ``app`` becomes problem details, and its OpenAPI says so."""

    @app.exception_handler(RequestError)
    async def unusable(request: Request, error: RequestError) -> JSONResponse:
        missing = isinstance(error, UnknownItem)
        place = "path" if missing else "body" if request.method in ("POST", "PUT") else "query"
        return problem(request.scope, 404 if missing else 422, None, [wrong_field(error, place)])

    @app.exception_handler(StoreError)
    async def no_store(request: Request, error: StoreError) -> JSONResponse:
        return problem(request.scope, 503, str(error), headers={"Retry-After": "1"})

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = [(found["loc"], found["msg"], found["type"]) for found in error.errors()]
        if any(kind == "json_invalid" for _, _, kind in wrong):
            return problem(request.scope, 400, "the body is not JSON", wrong)
        return problem(request.scope, 422, None, wrong)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return problem(request.scope, error.status_code, str(error.detail), headers=error.headers)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's OpenAPI with every refusal in the form in which it comes."""
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = made.setdefault("components", {})
    found = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        found.pop(name, None)
    template = "#/components/schemas/{model}"
    described = schemas.Problem.model_json_schema(ref_template=template)
    found |= described.pop("$defs")
    found["Problem"] = described
    components["responses"] = {f"Problem{status}": _described(status) for status in _EXAMPLES}
    closed = app.state.guard.closed
    if closed:
        components["securitySchemes"] = {
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "token": {"type": "http", "scheme": "bearer", "description": "a key, or a JSON Web Token"},
        }
    for path, operations in made["paths"].items():
        for operation in operations.values():
            if closed and "x-scope" in operation:
                operation["security"] = [{"key": []}, {"token": []}]
            answers = operation["responses"]
            statuses = {int(status) for status in answers if status >= "400"} - {422}
            if path != "/healthz":
                statuses.add(503)
            if "requestBody" in operation:
                statuses |= {400, 413, 415, 422}
            if operation.get("parameters"):
                statuses.add(422)
            if operation.get("security"):
                statuses |= {401, 403, 429}
            operation["responses"] = {status: answer for status, answer in answers.items() if status < "400"} | {
                str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in sorted(statuses)
            }
    return made


def _described(status: int) -> dict[str, Any]:
    detail, errors = _EXAMPLES[status]
    example = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    example |= {"errors": errors, "request_id": "3f0c0f6b5f3b4c5e8d8f9a1b2c3d4e5f"}
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}}
    headers = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}} if status == 429 else {}
    return {"description": HTTPStatus(status).phrase, "content": content} | ({"headers": headers} if headers else {})
