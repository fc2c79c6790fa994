"""Which errors are tried again, and after which delay."""

from __future__ import annotations

import httpx2
import openai
import pytest
from asyncpg import DeadlockDetectedError, SerializationError, UndefinedTableError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from millpond.errors import Forbidden, InvalidInput, NotDone, Transient, Unavailable
from millpond.retry import Retry, Verdict, backoff_s, classify, retry_after_s


class _Answered(Exception):
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


ASKED = httpx2.Request("POST", "https://far.example/")


def answered(status: int, **headers: str) -> httpx2.HTTPStatusError:
    """Return what `raise_for_status` raises."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = httpx2.Response(status, headers=named, request=ASKED)
    with pytest.raises(httpx2.HTTPStatusError) as caught:
        response.raise_for_status()
    return caught.value


def misfit() -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("seven")
    return caught.value


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (Transient("later"), Verdict.TRANSIENT),
        (Unavailable("away"), Verdict.TRANSIENT),
        (NotDone("not sent"), Verdict.TRANSIENT),
        (TimeoutError(), Verdict.TRANSIENT),
        (ConnectionResetError(), Verdict.TRANSIENT),
        (_Answered(429), Verdict.TRANSIENT),
        (_Answered(503), Verdict.TRANSIENT),
        (_Answered(401), Verdict.PERMANENT),
        (_Answered(404), Verdict.PERMANENT),
        (Forbidden("no"), Verdict.PERMANENT),
        (InvalidInput("no"), Verdict.PERMANENT),
        (ValueError("who knows"), Verdict.UNKNOWN),
        (misfit(), Verdict.PERMANENT),
        (PermissionError(13, "no"), Verdict.PERMANENT),
        (FileNotFoundError(2, "no"), Verdict.UNKNOWN),
        (answered(429), Verdict.TRANSIENT),
        (answered(502), Verdict.TRANSIENT),
        (answered(403), Verdict.PERMANENT),
        (answered(404), Verdict.PERMANENT),
        (answered(422), Verdict.PERMANENT),
        (httpx2.ConnectError("refused"), Verdict.TRANSIENT),
        (httpx2.ReadTimeout("slow"), Verdict.TRANSIENT),
        (httpx2.RemoteProtocolError("cut"), Verdict.TRANSIENT),
        (httpx2.UnsupportedProtocol("gopher"), Verdict.PERMANENT),
        (httpx2.DecodingError("what"), Verdict.UNKNOWN),
        (openai.APITimeoutError(request=ASKED), Verdict.TRANSIENT),
        (openai.APIConnectionError(request=ASKED), Verdict.TRANSIENT),
        (SerializationError("again"), Verdict.TRANSIENT),
        (DeadlockDetectedError("again"), Verdict.TRANSIENT),
        (UndefinedTableError("no"), Verdict.UNKNOWN),
    ],
)
def test_errors_are_read_by_class_and_status(error: Exception, verdict: Verdict) -> None:
    assert classify(error) is verdict


@given(
    tries=st.integers(1, 50),
    verdict=st.sampled_from(Verdict),
    elapsed_s=st.floats(0, 5000),
    wish_s=st.none() | st.floats(0, 100),
    dice=st.floats(0, 1, exclude_max=True),
)
def test_backoff_keeps_caps_floors_and_limits(
    tries: int, verdict: Verdict, elapsed_s: float, wish_s: float | None, dice: float
) -> None:
    policy = Retry(max_tries=5, unknown_tries=2, base_s=0.5, cap_s=8.0, max_elapsed_s=600.0)
    delay_s = backoff_s(
        policy,
        tries=tries,
        verdict=verdict,
        elapsed_s=elapsed_s,
        wish_s=wish_s,
        random=lambda: dice,
    )
    most = {Verdict.TRANSIENT: 5, Verdict.UNKNOWN: 2, Verdict.PERMANENT: 0}[verdict]
    if tries >= most:
        assert delay_s is None
        return
    if delay_s is None:
        assert elapsed_s + (wish_s or 0) + 8.0 > 600.0
        return
    assert (wish_s or 0) <= delay_s <= (wish_s or 0) + min(8.0, 0.5 * 2 ** (tries - 1))
    assert elapsed_s + delay_s <= 600.0


def test_the_other_sides_wish_is_read() -> None:
    assert retry_after_s(Transient("later", retry_after_s=3)) == 3.0
    assert retry_after_s(ValueError()) is None


@pytest.mark.parametrize(
    ("error", "wish_s"),
    [
        (answered(429, retry_after="7"), 7.0),
        (answered(503, retry_after="0.5"), 0.5),
        (answered(429), None),
        (answered(429, retry_after="soon"), None),
        (answered(429, retry_after="-3"), None),
        (answered(429, retry_after="inf"), None),
        (
            answered(
                503,
                retry_after="Wed, 21 Oct 2026 07:28:30 GMT",
                date="Wed, 21 Oct 2026 07:28:00 GMT",
            ),
            30.0,
        ),
        (answered(503, retry_after="Wed, 21 Oct 2026 07:28:30 GMT"), None),
        (httpx2.ConnectError("refused"), None),
    ],
)
def test_retry_after_is_read_from_an_answer(error: Exception, wish_s: float | None) -> None:
    assert retry_after_s(error) == wish_s


def test_a_policy_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Retry(max_tries=0)
    with pytest.raises(ValueError, match="cap_s"):
        Retry(base_s=5, cap_s=1)
