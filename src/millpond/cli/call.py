"""Runs one command's conversation with the server: client, token, event loop.

Called by the commands that talk HTTP. Invariant: what is heavy is imported here, when a command runs,
so that `millpond --help` stays quick.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from millpond.cli.options import Bearer

if TYPE_CHECKING:
    import httpx2

    from millpond.cli.remote import Remote

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who a command calls as, and how it came by that: a `token`, or `auth` for a kept session in `org`."""

    how: str
    token: str | None = field(default=None, repr=False)
    auth: httpx2.Auth | None = None
    org: str | None = None


NOBODY = Caller(how="nothing")


def call(url: str, bearer: Bearer | None, talk: Callable[[Remote], Awaitable[T]]) -> T:
    """Open a client for `url` as whoever calls, run `talk` with it, and return what that returns."""
    from millpond.settings import Settings

    given = bearer or Bearer()
    found = find_caller(given, url, Settings().data_dir)
    return call_as(replace(found, org=given.org or found.org), url, talk)


def call_as(caller: Caller, url: str, talk: Callable[[Remote], Awaitable[T]]) -> T:
    """Do the same as a caller that was found before."""
    from millpond.cli.remote import Remote

    async def run() -> T:
        connected = Remote.connect(url, caller.token, auth=caller.auth, org=caller.org)
        async with connected as remote:
            return await talk(remote)

    return asyncio.run(run())


def find_caller(given: Bearer, url: str, data_dir: Path) -> Caller:
    """Return who calls: by the token that was given, the session kept with this server, or the development token.

    Raises Unauthenticated when that session is over, Forbidden when others can read its file.
    """
    from millpond.cli.kept import SessionFile, over
    from millpond.cli.remote import find_token
    from millpond.cli.renewing import KeptSession

    if given.token:
        return Caller(how="the token that was given", token=given.token)
    file = SessionFile(url)
    kept = file.read()
    if kept is not None:
        if kept.is_over:
            raise over(file.url)
        return Caller(how=f"the session kept in {file.path}", auth=KeptSession(file), org=kept.org)
    token = find_token(None, url, data_dir)
    return Caller(how="the development token", token=token) if token else NOBODY
