"""Logs: one JSON object per line, with the request's id. User and item ids, histories, addresses and error messages
(which may contain any of these) are not logged."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

_LOG = logging.getLogger("recsys_ray.serve")


class JsonLines(logging.Formatter):
    """``extra={"fields": {...}}`` of a record become fields of its object."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {"time": f"{moment}.{int(record.msecs):03}Z", "level": record.levelname, "message": record.getMessage()}
        return json.dumps({**told, **getattr(record, "fields", {})}, ensure_ascii=False)


def write_json_lines() -> None:
    """Let the server's log go to standard error, and nowhere else. Serve may have put a buffer of its own before it."""
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonLines())
    _LOG.handlers, _LOG.propagate = [handler], False
    _LOG.setLevel(logging.INFO)


def told(scope: Mapping[str, Any], status: int, seconds: float) -> None:
    """A request has been answered. The route is written, not the path: paths hold ids."""
    level = logging.INFO if status < 500 else logging.ERROR
    if not _LOG.isEnabledFor(level):
        return
    fields = {
        "request_id": scope["request_id"],
        "method": scope["method"],
        "route": scope.get("route_path", "none"),
        "status": status,
        "ms": round(1e3 * seconds, 2),
        "caller": scope.get("caller"),
        "version": scope.get("bundle_version"),
        "answer": scope.get("answer"),
    }
    _LOG.log(level, "request", extra={"fields": fields})


def failed(request_id: str, error: Exception) -> None:
    """An error of ours, with its stack."""
    stack = traceback.format_tb(error.__traceback__)
    _LOG.error("failure", extra={"fields": {"request_id": request_id, "error": type(error).__name__, "stack": stack}})
