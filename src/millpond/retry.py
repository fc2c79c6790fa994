"""Retry with intent: which errors are tried again, when, and when no more.

Pure: randomness is passed in, no clock is read. Called by the executor and by `context`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from millpond.errors import MillpondError, NotDone, Transient


class Verdict(StrEnum):
    """What an error means for the next try."""

    TRANSIENT = "transient"
    PERMANENT = "permanent"
    UNKNOWN = "unknown"


class Trouble(StrEnum):
    """What an error says of the other side: it is asked too much, or it is not there."""

    THROTTLED = "throttled"
    DOWN = "down"


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often and how long a step is tried.

    `max_tries` counts executions, the first included; `unknown_tries` is the lower cap for errors
    of no known class. Delays are in seconds; `max_elapsed_s` counts from the first try of a step, and from the first
    error of a flow's own code, which may have waited for days before.
    """

    max_tries: int = 5
    unknown_tries: int = 3
    base_s: float = 0.5
    cap_s: float = 60.0
    max_elapsed_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.max_tries < 1 or self.unknown_tries < 1:
            raise ValueError("Retry: max_tries and unknown_tries are at least 1")
        if self.base_s < 0 or self.cap_s < self.base_s:
            raise ValueError("Retry: 0 <= base_s <= cap_s is expected")


NO_RETRY = Retry(max_tries=1, unknown_tries=1)
DEFAULT_RETRY = Retry()


# What HTTP libraries and SDKs call their timeouts and broken connections: httpx2, requests, aiohttp, openai, anthropic.
_BROKEN = frozenset(
    {
        "APIConnectionError",
        "APITimeoutError",
        "ClientConnectionError",
        "ConnectionError",
        "Timeout",
        "TimeoutError",
        "TimeoutException",
        "TransportError",
    }
)
# An address that no try makes better; to httpx2 it is a TransportError.
_HOPELESS = frozenset({"InvalidURL", "UnsupportedProtocol"})
# SQLSTATE: connection, serialization and deadlock, no room, shutting down or starting up.
_PASSING_STATES = ("08", "40", "53", "57P")


def classify(error: BaseException) -> Verdict:
    """Tell whether trying again may help.

    Timeouts and broken connections are transient, also those of HTTP libraries, which are known by the names of their
    classes; an error that carries an HTTP status, or an answer that has one, is read by it, one of a database by
    its SQLSTATE. What did not fit a type, and what the system did not permit, is permanent.
    """
    if isinstance(error, Transient | NotDone):
        return Verdict.TRANSIENT
    if isinstance(error, MillpondError | ValidationError | PermissionError):
        return Verdict.PERMANENT
    if isinstance(error, TimeoutError | ConnectionError):
        return Verdict.TRANSIENT
    status = _status(error)
    if status is not None:
        if status in (408, 409, 425, 429) or status >= 500:
            return Verdict.TRANSIENT
        if 400 <= status < 500:
            return Verdict.PERMANENT
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str) and state.startswith(_PASSING_STATES):
        return Verdict.TRANSIENT
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _HOPELESS:
        return Verdict.PERMANENT
    return Verdict.TRANSIENT if names & _BROKEN else Verdict.UNKNOWN


def retry_after_s(error: BaseException) -> float | None:
    """Read the other side's wish for a delay, in seconds, if the error or the answer that it carries has one."""
    wish = getattr(error, "retry_after_s", None)
    if wish is None:
        wish = _wish_of(getattr(_answer(error), "headers", None))
    if isinstance(wish, int | float) and math.isfinite(wish) and wish >= 0:
        return float(wish)
    return None


def trouble_of(error: BaseException) -> Trouble | None:
    """Tell whether an error says that the other side is asked too much, or that it is down; None where neither is said.

    A wish for a delay counts with status 503, or where the error names keys of limits. Of errors without a status,
    timeouts and broken connections count, and Millpond's own where they name keys.
    """
    if isinstance(error, NotDone) or classify(error) is not Verdict.TRANSIENT:
        return None
    status, is_named = _status(error), bool(getattr(error, "limit_keys", ()))
    has_wish = retry_after_s(error) is not None
    if status == 429 or (has_wish and (is_named or status == 503)):
        return Trouble.THROTTLED
    if status is not None:
        return Trouble.DOWN if status >= 500 or status == 408 else None
    if isinstance(error, MillpondError):
        return Trouble.DOWN if is_named or error.code == "timeout" else None
    return Trouble.DOWN if _is_broken(error) else None


def is_answer(error: BaseException) -> bool:
    """Whether an error is an answer of the other side, which so is there: it refuses, and does not ask for patience."""
    status = None if isinstance(error, NotDone) else _status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _is_broken(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, TimeoutError | ConnectionError) or bool(names & _BROKEN)


def _status(error: BaseException) -> int | None:
    if isinstance(error, MillpondError):
        status = error.details.get("status")
        return status if isinstance(status, int) else None
    for carrier in (error, _answer(error)):
        status = getattr(carrier, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _answer(error: BaseException) -> Any:
    """Return the answer that an error carries; some libraries raise where there is none."""
    try:
        return getattr(error, "response", None)
    except Exception:  # noqa: BLE001 - others' code
        return None


def _wish_of(headers: Any) -> float | None:
    """Read `Retry-After`: seconds, or a date, which is held against the answer's own."""
    try:
        wish = headers.get("Retry-After")
        if wish is None:
            wish = headers.get("retry-after")
        try:
            return float(wish)
        except ValueError:
            until, now = (parsedate_to_datetime(one) for one in (wish, headers.get("Date")))
            return max(0.0, (until - now).total_seconds())
    except Exception:  # noqa: BLE001 - whatever an answer of others holds, it is no wish then
        return None


def backoff_s(
    policy: Retry,
    *,
    tries: int,
    verdict: Verdict,
    elapsed_s: float,
    wish_s: float | None,
    random: Callable[[], float],
) -> float | None:
    """Return the delay before the next try, or None when the step has to fail.

    Exponential backoff with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter");
    `tries` are those already made, `random` returns a number in [0, 1). A wish of the other side
    is a floor, also above the cap.
    """
    if verdict is Verdict.PERMANENT:
        return None
    cap = policy.max_tries if verdict is Verdict.TRANSIENT else policy.unknown_tries
    if tries >= min(cap, policy.max_tries):
        return None
    ceiling = min(policy.cap_s, policy.base_s * 2.0 ** min(tries - 1, 30))
    delay = random() * ceiling
    if wish_s is not None:
        delay = wish_s + delay
    if elapsed_s + delay > policy.max_elapsed_s:
        return None
    return delay
