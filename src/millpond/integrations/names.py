"""Names looked up by the system's resolver, in threads of their own: so many at once for one payer, and in all.

Called by the egress guard. Invariant: a lookup cannot be stopped, so it counts until the system ends it, however long
its asker waited; when there is no room, more are refused and none waits in line.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from millpond.errors import Unavailable
from millpond.integrations.egress_rules import Address, literal

# On whose behalf a request is sent; set around it, since a connection is opened deep within the client.
payer: ContextVar[str] = ContextVar("payer", default="")

# Returns what `socket.getaddrinfo` does; raises OSError.
LookUp = Callable[[str, int], list[Any]]


def _ask(host: str, port: int) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class Names:
    """Looks names up; closed by whoever made it."""

    def __init__(self, look_up: LookUp = _ask, *, for_payer: int = 4, in_all: int = 32) -> None:
        self._look_up = look_up
        self._for_payer = for_payer
        self._in_all = in_all
        self._under_way: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(in_all, thread_name_prefix="names")

    async def resolve(self, host: str, port: int) -> list[Address]:
        """Return the addresses of a name, in the order to try; raises OSError, or Unavailable without room."""
        who = payer.get()
        if self._under_way.total() >= self._in_all or self._under_way[who] >= self._for_payer:
            raise Unavailable(
                "Too many names are being looked up at this moment.",
                code="egress_busy",
                retry_after_s=10.0,
            )
        loop = asyncio.get_running_loop()
        self._under_way[who] += 1
        asked = self._threads.submit(self._look_up, host, port)
        asked.add_done_callback(lambda done: self._end(loop, done, who))
        found = await asyncio.wrap_future(asked)
        addresses = [literal(str(one[4][0])) for one in found]
        return list(dict.fromkeys(one for one in addresses if one is not None))

    def close(self) -> None:
        """Take no more; lookups under way are left to end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _end(self, loop: asyncio.AbstractEventLoop, _: Future[Any], who: str) -> None:
        """Count a lookup as ended, in the loop's thread; without a loop nobody asks any more."""
        try:
            loop.call_soon_threadsafe(self._leave, who)
        except RuntimeError:
            return

    def _leave(self, who: str) -> None:
        self._under_way[who] -= 1
        if self._under_way[who] <= 0:
            del self._under_way[who]
