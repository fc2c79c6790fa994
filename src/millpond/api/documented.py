"""What every route's documentation shares: problem responses and the headers of a 202.

Called by the routes where they are declared; pure data.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from millpond.api.models import Problem

ACCEPTED_HEADERS: dict[str, Any] = {
    "Location": {"description": "Where the run is.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds until a look pays.", "schema": {"type": "integer"}},
    "Idempotency-Replayed": {
        "description": "`true` when this repeats the answer to an earlier request.",
        "schema": {"type": "string"},
    },
    "Run-Joined": {
        "description": "`true` when this is a live run with the same deduplication key.",
        "schema": {"type": "string"},
    },
}
BATCH_HEADERS: dict[str, Any] = {
    name: ACCEPTED_HEADERS[name] for name in ("Retry-After", "Idempotency-Replayed")
}
_WORDS = {
    400: "The body or a header cannot be read.",
    401: "The token is missing or not good.",
    402: "A quota of the organization is used up; `quota`, `used`, `maximum` and `renews_at` say which and until when. "
    "Or its plan has no such `feature`.",
    403: "The token lacks a permission or role.",
    404: "There is no such thing in this org.",
    409: "The state of it does not allow this.",
    413: "The body is too large.",
    415: "The body is of another type than expected.",
    422: "A field is not valid; `error.param` and `errors` name it.",
    429: "Too many requests or tries; `Retry-After` says when the next one is let through.",
    500: "Something went wrong here; the log has more under the request id.",
    503: "The database cannot be reached; nothing was accepted for sure. Retry as `Retry-After` says.",
}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of these failures and of 500, each a problem document.

    A caller who is known may also be one who asks too often (429).
    """
    limited = (429,) if 401 in statuses and 429 not in statuses else ()
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    return {
        status: {
            "description": _WORDS.get(status, HTTPStatus(status).phrase),
            "content": {"application/problem+json": {"schema": schema}},
        }
        for status in sorted({*statuses, *limited, 500})
    }
