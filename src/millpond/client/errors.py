"""What a call can raise: one class per reaction, made from the server's problem documents.

Raised by the transports and by runs. Invariant: every refusal and every broken connection becomes one
of these; `code`, `param` and `request_id` are the server's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from millpond.client.models import RunData


class ApiError(Exception):
    """A call that did not succeed; `status` is None when no answer came."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str = "error",
        param: str | None = None,
        advice: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
        problem: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.advice = advice
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.problem = dict(problem or {})


class InvalidRequest(ApiError):
    """What was sent is not valid (400, 413, 415, 422); `param` names the field."""


class Unauthenticated(ApiError):
    """The token is missing, malformed, expired or revoked (401)."""


class Forbidden(ApiError):
    """The caller may not do this (403)."""


class NotFound(ApiError):
    """The named thing does not exist for this caller (404)."""


class Conflict(ApiError):
    """The thing is in a state that does not allow this (409)."""


class OverQuota(ApiError):
    """A quota of the organization is used up, or its plan has no such feature (402).

    `problem` has `quota`, `used`, `maximum` and `renews_at`, or `feature`.
    """


class Unavailable(ApiError):
    """The server cannot be reached or asked to come back later, and did not recover in time."""


class WaitTimeout(Exception):
    """A run did not end within the time that the caller wanted to wait; it goes on."""


class RunFailed(Exception):
    """The run that was waited for has failed; `run` tells why."""

    def __init__(self, run: RunData) -> None:
        error = run.error or {}
        super().__init__(f"run {run.id} failed: {error.get('code')}: {error.get('message')}")
        self.run = run


class RunCancelled(Exception):
    """The run that was waited for was cancelled."""

    def __init__(self, run: RunData) -> None:
        super().__init__(f"run {run.id} was cancelled")
        self.run = run


_CLASSES: dict[int, type[ApiError]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    402: OverQuota,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Conflict,
    413: InvalidRequest,
    415: InvalidRequest,
    422: InvalidRequest,
    429: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def refusal(status: int, document: object, *, retry_after_s: float | None) -> ApiError:
    """Make the error of an answer from its status and its problem document, if it has one."""
    problem = document if isinstance(document, dict) else {}
    inner = problem.get("error")
    message = problem.get("detail") or problem.get("title") or f"the server answered {status}"
    return _CLASSES.get(status, ApiError)(
        str(message),
        status=status,
        code=str(problem.get("code") or "error"),
        param=inner.get("param") if isinstance(inner, dict) else None,
        advice=problem.get("advice"),
        request_id=problem.get("request_id"),
        retry_after_s=retry_after_s,
        problem=problem,
    )
