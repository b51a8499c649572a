"""Every error leaves the server as `{"error": {"message", "type", "param", "code"}}`, as the OpenAI API does."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from shoal.errors import RequestError, ShoalError

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}
TYPES |= {408: "timeout_error"}
CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}


class ApiError(Exception):
    """An HTTP error with its body; raised anywhere below a route."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or CODES.get(status)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), status=self.status, headers=self.headers)


def named(error: Exception, fields: Mapping[str, str]) -> Exception:
    """A RequestError that names an argument of the engine, under the client's name of the field it came from."""
    field = fields.get(error.param or "") if isinstance(error, RequestError) else None
    if not isinstance(error, RequestError) or field is None:
        return error
    return RequestError(field, str(error).removeprefix(f"{error.param}: "), code=error.code)


INTERNAL = ApiError(500, "the server failed to answer; its log says why", code="internal_error")


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def as_api_error(error: BaseException) -> ApiError:
    """The client's view of any failure. Texts of unforeseen errors stay in the server's log: they may hold paths."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, HTTPException):
        message = {404: "no such route", 405: "this route does not take that method"}.get(
            error.status_code, str(error.detail)
        )
        return ApiError(error.status_code, message, headers=error.headers)
    if isinstance(error, RecursionError):  # the parser lets through what some writers of JSON cannot write
        return ApiError(400, "the request is nested too deeply", code="invalid_value")
    if isinstance(error, MemoryError):
        return ApiError(503, "not enough memory for this request", code="out_of_memory", headers={"retry-after": "5"})
    # One line for a known kind of failure, the whole trace for a fault of ours.
    if isinstance(error, ShoalError):
        print(f"shoal: error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return INTERNAL


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for the errors that are foreseen."""
    answer = as_api_error(error)
    request.app.state.service.worker.metrics.count_refused(answer)
    return answer.response()


async def handle_crash(request: Request, error: Exception) -> Response:
    """For all others; Starlette raises them once more behind it, so that uvicorn logs the trace. It then closes the
    connection, which the client must know, or its next request there would be lost."""
    request.app.state.service.worker.metrics.count_refused(INTERNAL)
    return json_response(INTERNAL.body(), status=500, headers={"connection": "close"})
