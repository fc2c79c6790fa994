"""Runs one command's conversation with the server: client, token, event loop.

Called by the commands that talk HTTP. Invariant: what is heavy is imported here, when a command runs,
so that `millpond --help` stays quick.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from millpond.cli.remote import Remote

T = TypeVar("T")
# Set once by `main` from the option that stands before every command.
ORGANIZATION: ContextVar[str | None] = ContextVar("organization", default=None)


def call(url: str, token: str | None, talk: Callable[[Remote], Awaitable[T]]) -> T:
    """Open a client for `url`, run `talk` with it, and return what that returns."""
    from millpond.cli.remote import Remote, find_token
    from millpond.settings import Settings

    held = find_token(token, url, Settings().data_dir)

    async def run() -> T:
        async with Remote.connect(url, held, ORGANIZATION.get()) as remote:
            return await talk(remote)

    return asyncio.run(run())
