"""The API's listening socket: opened before the process that serves on it.

Called by `platform` and `serve`. Invariant: while `millpond up` lives its port is never free, so that
a restarted API process is found where the first one was.
"""

from __future__ import annotations

import asyncio
import socket
import time

from millpond.errors import Conflict

# A killed `millpond up` leaves an API that ends by itself within this time and holds the port.
_PATIENCE_S = 6.0
_POLL_S = 0.05
_BACKLOG = 512


async def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; raises Conflict when the port stays taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if time.monotonic() > until:
                raise Conflict(
                    f"Port {port} on {host} cannot be used: {error.strerror}.",
                    code="port_in_use",
                    advice="Name another one by --port or MILLPOND_PORT (0 takes a free one).",
                ) from error
        await asyncio.sleep(_POLL_S)


def address(listener: socket.socket) -> str:
    """Return the URL of what serves on `listener`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
