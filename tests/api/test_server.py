"""The server's sockets."""

from __future__ import annotations

import asyncio
import socket

import httpx2

from millpond.api.server import ApiServer

from .conftest import Front, bind


async def test_an_answers_parts_are_sent_without_waiting_for_each_other(front: Front) -> None:
    """Python opens listening sockets with protocol 0, for which asyncio leaves Nagle's algorithm on."""
    listener = bind()
    assert listener.proto == 0
    server, stop = ApiServer(front.app), asyncio.Event()
    serving = asyncio.create_task(server.run_until(stop, [listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx2.AsyncClient(base_url=url, trust_env=False) as client:
        assert (await client.get("/healthz")).status_code == 200
        (connection,) = server.server_state.connections
        taken = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    stop.set()
    await serving
