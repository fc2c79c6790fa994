"""Sending: how a call becomes a request, when it is repeated, and how an answer is read. Pure.

Called by both clients, which only do the input and output. Invariant: a call is repeated only when
that cannot do something twice: the call is repeatable, no connection was made, or the server said that
it did nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from pydantic_core import to_jsonable_python

from millpond.client.call import Call
from millpond.client.errors import ApiError, Unavailable, refusal

T = TypeVar("T")

# The code of a 503 whose transaction was rolled back. Any other 503 may come of a database that went
# away while it committed, and says nothing of what was done.
_ROLLED_BACK = "transient"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a call is tried: `max_tries` requests within `max_elapsed_s` seconds.

    Delays are exponential with full jitter; what the server asks for in `Retry-After` is obeyed.
    """

    max_tries: int = 6
    max_elapsed_s: float = 60.0
    base_s: float = 0.25
    cap_s: float = 8.0

    def delay_s(self, error: ApiError, *, tries: int, elapsed_s: float) -> float | None:
        """Return the pause before the next try, None when there is to be none."""
        if tries >= self.max_tries:
            return None
        jitter = random.random() * min(self.cap_s, self.base_s * 2.0 ** (tries - 1))
        delay = (error.retry_after_s or 0.0) + jitter
        return delay if elapsed_s + delay <= self.max_elapsed_s else None


def may_repeat(call: Call[Any], error: ApiError) -> bool:
    """Tell whether a failed call may be sent again."""
    if not isinstance(error, Unavailable):
        return False
    return call.is_repeatable or _is_nothing_done(error)


def _is_nothing_done(error: Unavailable) -> bool:
    if error.status == 503:
        return error.code == _ROLLED_BACK
    return error.status == 429 or error.code == "not_connected"


def request_of(call: Call[Any]) -> dict[str, Any]:
    """Return the arguments of the HTTP library's `request` for a call."""
    arguments: dict[str, Any] = {"method": call.method, "url": call.path}
    if call.params:
        arguments["params"] = dict(call.params)
    if call.content is not None:
        arguments["content"] = call.content
    elif call.body is not None:
        arguments["json"] = to_jsonable_python(call.body, fallback=_plain)
    if call.idempotency_key is not None:
        arguments["headers"] = {"Idempotency-Key": call.idempotency_key}
    return arguments


def result_of(call: Call[T], response: httpx2.Response) -> T:
    """Return what a call gives, or raise what its answer says."""
    if response.is_error:
        raise refused(response)
    if call.is_text:
        return call.read(response.text)
    return call.read(_json(response) if response.content else None)


def refused(response: httpx2.Response) -> ApiError:
    """Make the error of an answer."""
    try:
        document = response.json()
    except ValueError:
        document = None
    wish_s = seconds_of(response.headers.get("Retry-After"))
    return refusal(response.status_code, document, retry_after_s=wish_s)


def unreachable(error: httpx2.TransportError, url: object) -> Unavailable:
    """Make the error of a connection that failed; one never made has surely done nothing."""
    is_connecting = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
    return Unavailable(
        f"the server at {url} cannot be reached ({type(error).__name__})",
        code="not_connected" if is_connecting else "connection_broken",
    )


def seconds_of(header: str | None) -> float | None:
    """Read Retry-After as a number of seconds; its form as a date is not used by Millpond."""
    try:
        return max(0.0, float(header)) if header is not None else None
    except ValueError:
        return None


def headers_of(token: str | None, organization: str | None = None) -> Mapping[str, str]:
    """Return the headers of every request; `organization` is an id or slug."""
    headers = {"Accept": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if organization:
        headers["X-Organization-Id"] = organization
    return headers


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} cannot be sent as JSON")


def _json(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise ApiError(
            f"{response.url} did not answer with JSON; is this the address of a Millpond server?",
            status=response.status_code,
            code="not_json",
        ) from error
