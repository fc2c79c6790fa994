"""Problems: errors as RFC 9457 documents, with the member `error` that OpenAI clients read.

Called by the app for every error that leaves a route; the only place that maps errors to HTTP.
Invariant: an error that is not the caller's shows its id and nothing else, and is logged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millpond.api.reply import encode
from millpond.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    MillpondError,
    NotFound,
    OverQuota,
    SchemaMismatch,
    Transient,
    Unauthenticated,
)
from millpond.types import new_id

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = b"x-request-id"
_log = structlog.get_logger("millpond.api")


@dataclass(frozen=True)
class Kind:
    """How a class of errors looks over HTTP."""

    status: int
    type: str
    title: str


_KINDS: tuple[tuple[type[MillpondError], Kind], ...] = (
    (InvalidInput, Kind(422, "invalid_request_error", "The request is not valid")),
    (NotFound, Kind(404, "not_found_error", "Not found")),
    (Unauthenticated, Kind(401, "authentication_error", "Not authenticated")),
    (Forbidden, Kind(403, "permission_error", "Not permitted")),
    (OverQuota, Kind(402, "quota_error", "Quota used up")),
    (Conflict, Kind(409, "conflict_error", "Conflict")),
    (Transient, Kind(503, "unavailable_error", "Unavailable for now")),
    (SchemaMismatch, Kind(503, "unavailable_error", "Unavailable for now")),
)
_TOO_MANY = Kind(429, "rate_limit_error", "Too many requests")
_INTERNAL = Kind(500, "server_error", "Internal error")
_STATUS_OF_CODE = {
    "malformed_body": 400,
    "malformed_header": 400,
    "too_large": 413,
    "unsupported_media_type": 415,
    "rate_limited": 429,
}
# What an error's details may add to its document.
_MEMBERS = ("run_id", "quota", "used", "maximum", "renews_at", "feature")
_KIND_OF_STATUS = {kind.status: kind for _, kind in _KINDS}


def problem(error: MillpondError, request_id: str) -> Response:
    """Return the response for an error of Millpond's tree."""
    kind = next((kind for of, kind in _KINDS if isinstance(error, of)), _INTERNAL)
    if kind is _INTERNAL:
        _log.error(
            "request.failed", request_id=request_id, code=error.code, error=type(error).__name__
        )
        return _internal(request_id)
    status = _STATUS_OF_CODE.get(error.code, kind.status)
    kind = _TOO_MANY if status == _TOO_MANY.status else kind
    return _document(
        status,
        kind,
        error.message,
        code=error.code,
        param=error.param,
        advice=error.advice,
        errors=error.details.get("errors"),
        more={
            name: error.details[name] for name in _MEMBERS if error.details.get(name) is not None
        },
        request_id=request_id,
        headers=_headers(error),
    )


def invalid(faults: Iterable[Mapping[str, Any]], *, skip: int = 0) -> InvalidInput:
    """Make one error of pydantic's many; `skip` leaves out leading parts of the locations."""
    errors = faults_of(faults, skip=skip)
    named = "; ".join(f"{fault['param'] or 'body'}: {fault['message']}" for fault in errors)
    return InvalidInput(named, param=errors[0]["param"], details={"errors": errors})


def faults_of(faults: Iterable[Mapping[str, Any]], *, skip: int = 0) -> list[dict[str, Any]]:
    """Return pydantic's errors as a problem's `errors`."""
    return [
        {
            "param": ".".join(map(str, fault["loc"][skip:])) or None,
            "code": fault["type"],
            "message": fault["msg"],
        }
        for fault in faults
    ]


def install(app: FastAPI) -> None:
    """Let every error of the app become a problem document."""
    app.add_exception_handler(MillpondError, _on_ours)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_middleware(Shield)


class Shield:
    """Gives each request an id, and answers 500 without detail to what nobody expected.

    Headers that a request was given on its way, such as those on its rate, go out with whatever answers it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's message exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id().hex
        scope.setdefault("state", {})["request_id"] = request_id
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                more = scope["state"].get("more_headers", ())
                message["headers"] = [*message["headers"], (REQUEST_ID, request_id.encode()), *more]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:  # who left before the body was whole waits for no answer
            return
        except Exception as error:
            _log.exception("request.failed", request_id=request_id, error=type(error).__name__)
            if has_begun:
                raise
            await _internal(request_id)(scope, receive, send_with_id)


async def _on_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, MillpondError)
    return problem(error, request.state.request_id)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # The first part of a location says where: query, path, header.
    return problem(invalid(error.errors(), skip=1), request.state.request_id)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    kind = _KIND_OF_STATUS.get(
        status, Kind(status, "invalid_request_error" if status < 500 else "server_error", "")
    )
    return _document(
        status,
        Kind(status, kind.type, status.phrase),
        f"{request.method} {request.url.path}: {status.phrase}",
        code=status.name.lower(),
        request_id=request.state.request_id,
        headers=dict(error.headers or {}),
    )


def _internal(request_id: str) -> Response:
    return _document(
        500,
        _INTERNAL,
        "Something went wrong on the server; its log has more under this request id.",
        code="internal",
        request_id=request_id,
    )


def _headers(error: MillpondError) -> dict[str, str]:
    if isinstance(error, Transient | SchemaMismatch):
        wish_s = error.retry_after_s if isinstance(error, Transient) else None
        return {"Retry-After": str(max(1, math.ceil(wish_s or 1)))}
    if isinstance(error, Unauthenticated):
        is_absent = error.code == "token_missing"
        return {
            "WWW-Authenticate": 'Bearer realm="millpond"'
            + ("" if is_absent else ', error="invalid_token"')
        }
    if error.code == "too_large":
        return {"Connection": "close"}  # the rest of the body is not read
    return {}


def _document(
    status: int,
    kind: Kind,
    detail: str,
    *,
    code: str,
    request_id: str,
    param: str | None = None,
    advice: str | None = None,
    errors: object = None,
    more: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    document: dict[str, Any] = {
        "type": f"urn:millpond:problem:{code}",
        "title": kind.title,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request_id,
        "error": {"message": detail, "type": kind.type, "code": code, "param": param},
    }
    if advice:
        document["advice"] = advice
    if errors:
        document["errors"] = errors
    document |= more or {}
    return Response(encode(document), status, dict(headers or {}), MEDIA_TYPE)
