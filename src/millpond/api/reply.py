"""JSON replies: written by orjson, in the shapes that `shapes` documents.

Called by every route. Invariant: JSON that the database stores as text goes out as it is, unparsed.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import Response

from millpond.api.paging import Page
from millpond.types import Json

JSON = "application/json"


def encode(content: Any) -> bytes:
    """Return JSON in UTF-8; bytes become hex digits, times RFC 3339 in UTC with `Z`."""
    return orjson.dumps(content, default=_other, option=orjson.OPT_UTC_Z)


def reply(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(encode(content), status, dict(headers or {}), JSON)


def raw(text: str | None) -> Json:
    """Return stored JSON text such that it goes out as it is; None stays null."""
    return None if text is None else orjson.Fragment(text)


def listing(data: Sequence[Mapping[str, Any]], *, has_more: bool) -> Page:
    """Return one page of a list with the cursors of its ends."""
    return {
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def _other(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, uuid.UUID):  # the driver's own subclass
        return str(value)
    if isinstance(value, uuid.UUID):
        return str(value)  # the driver's own subclass
    raise TypeError(f"{type(value).__name__} is not JSON")
