"""Sends a kept session's token, and renews it before it ends or when the server asks for it.

Used by `call`. Invariants: a refresh token is sent by one command at a time, under the file's lock, since a second use
ends the session; what came for it is on disk before it is used, also when the command is interrupted meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

import httpx2

from millpond.cli.kept import Kept, SessionFile, over
from millpond.cli.remote import away, is_this_machine, problem
from millpond.errors import Unauthenticated
from millpond.types import Json

# What a new access token can help with; everything else is a wrong token.
_RENEWABLE = frozenset({"token_expired", "token_stale", "token_unknown_key"})
_EARLY_S = 60.0
_TIMEOUT = httpx2.Timeout(30.0, connect=5.0)


class KeptSession(httpx2.Auth):
    """The bearer of every request of a client."""

    def __init__(self, file: SessionFile) -> None:
        self._file = file

    async def async_auth_flow(
        self, request: httpx2.Request
    ) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """Send a request with a token that is good for a while; once more with a new one if that is refused."""
        # In a thread, which the end of the event loop waits for: an interrupt does not lose a token that was traded.
        kept = await asyncio.to_thread(current, self._file)
        request.headers["Authorization"] = f"Bearer {kept.access_token}"
        response = yield request
        if response.status_code == httpx2.codes.UNAUTHORIZED:
            await response.aread()
            if problem(response).code in _RENEWABLE:
                newer = await asyncio.to_thread(renewed, self._file, kept.access_token)
                request.headers["Authorization"] = f"Bearer {newer.access_token}"
                yield request


def current(file: SessionFile) -> Kept:
    """Return a session whose access token is good for a while; raises Unauthenticated when it is over."""
    kept = _read(file)
    return kept if time.time() < kept.renew_at else renewed(file, kept.access_token)


def renewed(file: SessionFile, used: str) -> Kept:
    """Return a session with another access token than `used`: what another command traded, or what this one does.

    Raises Unauthenticated when the session is over, Transient when the server does not answer.
    """
    with file.lock():
        kept = _read(file)
        if kept.access_token != used and time.time() < kept.renew_at:
            return kept
        try:
            answer = ask(file.url, "refresh", {"refresh_token": kept.refresh_token})
        except Unauthenticated as error:
            if error.code != "refresh_invalid":
                raise
            file.write(replace(kept, access_token="", refresh_token=""))
            raise over(file.url) from error
        newer = replace(kept, **tokens_of(answer))
        file.write(newer)
        return newer


def tokens_of(answer: Json) -> dict[str, Json]:
    """Return what of an answer to signing in or renewing is kept."""
    lasts_s = float(answer["expires_in"])
    return {
        "access_token": answer["access_token"],
        "refresh_token": answer["refresh_token"],
        "renew_at": time.time() + lasts_s - min(_EARLY_S, lasts_s / 4),
    }


def ask(url: str, what: str, body: Json) -> Json:
    """POST to a route of `/v1/auth` without a token, and return its JSON; None where it has no content."""
    try:
        response = httpx2.post(
            f"{url}/v1/auth/{what}", json=body, timeout=_TIMEOUT, trust_env=not is_this_machine(url)
        )
    except httpx2.TransportError as error:
        raise away(url, error) from error
    if response.is_error:
        raise problem(response)
    return response.json() if response.content else None


def _read(file: SessionFile) -> Kept:
    kept = file.read()
    if kept is None or kept.is_over:
        raise over(file.url)
    return kept
