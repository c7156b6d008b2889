"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from dfssm.base.errors import DfssmError
from dfssm.runtime import QueueFull

LOG = logging.getLogger("dfssm.serve")

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer with a status of 4xx or 5xx, and what is wrong in one line.

    `close`: the connection is closed after it, as there is more to read that nobody wants.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, close: bool = False
    ):
        super().__init__(status, message, {"connection": "close"} if close else None)
        self.param, self.code = param, code


def answer(error: Exception) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    """Status, JSON and headers of the answer that `error` is. What is no answer is a bug, and logged."""
    if isinstance(error, ApiError):
        return error.status_code, body(error.status_code, error.detail, error.param, error.code), error.headers or {}
    if isinstance(error, HTTPException):
        return error.status_code, body(error.status_code, error.detail), error.headers or {}
    if isinstance(error, RequestValidationError):
        found = error.errors()[0]
        param = next((part for part in found["loc"][1:] if isinstance(part, str)), None)
        return 400, body(400, f"{param}: {found['msg']}" if param else found["msg"], param), {}
    if isinstance(error, QueueFull):
        return 429, body(429, str(error)), {"retry-after": "1"}
    if isinstance(error, DfssmError):
        return 400, body(400, str(error)), {}
    LOG.error("a bug", exc_info=error)
    return 500, body(500, "the server has failed: its log says how"), {}


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {"message": message, "type": kind, "param": param, "code": code or HTTPStatus(status).name.lower()}
    }
