"""Request bodies: read after authorization, with a cap on their size, parsed into models.

Called by the routes that take a body, instead of FastAPI's own reading, which comes before any
dependency: nobody unknown makes this process read a large body.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError

from millpond.api.problems import invalid
from millpond.engine.payloads import MAX_BYTES
from millpond.errors import InvalidInput

MAX_JSON_BYTES = 1024 * 1024
# A wish to start a run: the largest input that is stored, and room for the rest.
MAX_START_BYTES = MAX_BYTES + MAX_JSON_BYTES
# So much beyond the cap is read and dropped, so that its sender gets to the answer: closing with
# unread data in the socket would reset the connection under it.
_DRAIN_BYTES = 16 * 1024 * 1024
# JSON is written with at most 254 levels (orjson), and what comes in is stored inside other JSON.
_SPARE_LEVELS = 128
_MAX_LEVELS = 254 - _SPARE_LEVELS
_Model = TypeVar("_Model", bound=BaseModel)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the whole body; raises InvalidInput (413) when it is larger than the cap."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes + _DRAIN_BYTES:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size_bytes = 0
    async for chunk in request.stream():
        size_bytes += len(chunk)
        if size_bytes <= max_bytes:
            chunks.append(chunk)
        elif size_bytes > max_bytes + _DRAIN_BYTES:
            break
        else:
            chunks.clear()
    if size_bytes > max_bytes:
        raise _too_large(max_bytes)
    return b"".join(chunks)


async def read_json(
    request: Request,
    model: type[_Model],
    *,
    is_optional: bool = False,
    max_bytes: int = MAX_JSON_BYTES,
) -> _Model:
    """Return the JSON body as `model`; raises InvalidInput that names every field at fault.

    With `is_optional`, no body counts as `{}`.
    """
    body = await read_body(request, max_bytes)
    if not body and is_optional:
        body = b"{}"
    else:
        _check_media_type(request)
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(
            f"The body is not JSON: {error.msg} at character {error.pos}.", code="malformed_body"
        ) from error
    _check_depth(document, body)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from error


def described(
    model: type[BaseModel], *, is_required: bool = True, parameters: Sequence[Any] = ()
) -> dict[str, Any]:
    """Return what a route's `openapi_extra` says about its JSON body; `app` adds the model.

    `parameters` are those that the route reads by itself.
    """
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    body = {"required": is_required, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": body, **({"parameters": [*parameters]} if parameters else {})}


def _check_depth(document: Any, body: bytes) -> None:
    if body.count(b"{") + body.count(b"[") <= _MAX_LEVELS:  # no deeper than what it opens
        return
    for _ in range(_SPARE_LEVELS):
        document = [document]
    try:
        orjson.dumps(document)
    except orjson.JSONEncodeError as error:
        raise InvalidInput(
            f"The body is nested in more than {_MAX_LEVELS} levels.", code="too_deep"
        ) from error


def _check_media_type(request: Request) -> None:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidInput(
            "The body's Content-Type is not JSON.",
            code="unsupported_media_type",
            advice="send `Content-Type: application/json`",
        )


def _too_large(max_bytes: int) -> InvalidInput:
    return InvalidInput(
        f"The body is larger than {max_bytes} bytes.",
        code="too_large",
        param="body",
        advice="store large data elsewhere and pass a reference",
    )
