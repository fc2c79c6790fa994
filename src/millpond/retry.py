"""Retry with intent: which errors are tried again, when, and when no more.

Pure: randomness is passed in, no clock is read. Called by the executor and by `context`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from millpond.errors import MillpondError, NotDone, Transient


class Verdict(StrEnum):
    """What an error means for the next try."""

    TRANSIENT = "transient"
    PERMANENT = "permanent"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often and how long a step is tried.

    `max_tries` counts executions, the first included; `unknown_tries` is the lower cap for errors
    of no known class. Delays are in seconds; `max_elapsed_s` counts from the first try.
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


def classify(error: BaseException) -> Verdict:
    """Tell whether trying again may help.

    Timeouts and broken connections are transient; an error that carries an HTTP `status_code`
    (as the SDKs of model providers raise) is read by it.
    """
    if isinstance(error, Transient | NotDone):
        return Verdict.TRANSIENT
    if isinstance(error, MillpondError):
        return Verdict.PERMANENT
    if isinstance(error, TimeoutError | ConnectionError):
        return Verdict.TRANSIENT
    status = getattr(error, "status_code", None)
    if isinstance(status, int):
        if status in (408, 409, 425, 429) or status >= 500:
            return Verdict.TRANSIENT
        if 400 <= status < 500:
            return Verdict.PERMANENT
    return Verdict.UNKNOWN


def retry_after_s(error: BaseException) -> float | None:
    """Read the other side's wish for a delay, in seconds, if the error carries one."""
    wish = getattr(error, "retry_after_s", None)
    return float(wish) if isinstance(wish, int | float) and wish >= 0 else None


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
