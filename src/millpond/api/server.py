"""The server: uvicorn around the app, that ends open streams before it waits for requests.

Called by `cli`, which owns the signals, and by the tests. Invariant: after `stop` is set no new
connection is taken, streams end at once, requests in flight get `grace_s`. A client's address is that of its
connection, or what one of `trusted_proxies` forwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence

import uvicorn
from fastapi import FastAPI


class ApiServer(uvicorn.Server):
    """Serves an app on sockets that the caller has bound."""

    def __init__(
        self, app: FastAPI, *, grace_s: float = 5.0, trusted_proxies: Sequence[str] = ()
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=list(trusted_proxies),
                ws="none",
                timeout_keep_alive=15,
                timeout_graceful_shutdown=max(1, round(grace_s)),
            )
        )
        self._stopping: asyncio.Event = app.state.ports.stopping

    async def run_until(self, stop: asyncio.Event, sockets: list[socket.socket]) -> None:
        """Serve until `stop` is set, then end what is open and return."""
        for one in sockets:
            _send_at_once(one)
        serving = asyncio.create_task(self.serve(sockets=sockets), name="api.serve")
        stopped = asyncio.create_task(stop.wait(), name="api.stop")
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        self.should_exit = True
        stopped.cancel()
        await serving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End open streams, then shut down as uvicorn does."""
        self._stopping.set()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the process."""
        yield


def _send_at_once(listener: socket.socket) -> None:
    """Let connections of a listening socket send without waiting for what they sent before to be acknowledged.

    The head and the body of an answer are two writes, and a client acknowledges the first up to 40 ms later. asyncio
    turns this off only for sockets that were opened with TCP's number, not with 0; connections have it from their
    listener.
    """
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
