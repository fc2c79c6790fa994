"""Addresses that ask for TLS: the server's certificate and name are checked, by pools, hints and listeners alike.

The embedded server knows no TLS, so this is the distribution's.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from cryptography.hazmat.primitives import serialization
from tests.db.test_other_servers import _oldest_of_debian, _require, _server
from tests.db.test_other_servers import folder as folder
from tests.integrations.test_mail_tls import Authority

from millpond.db.pool import Database
from millpond.engine.hints import WAKE, Hints, Listener
from millpond.errors import MillpondError

DEADLINE_S = 20.0


@pytest.fixture
def trusted(folder: Path) -> Authority:
    """Who signed the server's certificate."""
    return Authority.make("trusted")


def authority_file(folder: Path, authority: Authority, name: str) -> Path:
    """Write what a client has to trust."""
    path = folder / name
    path.write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
async def address(folder: Path, trusted: Authority) -> AsyncIterator[str]:
    """The address of a server on loopback that lets nobody in without TLS."""
    trusted.serves(folder, "127.0.0.1")
    [pem] = folder.glob("*.pem")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = (
        "listen_addresses=127.0.0.1", f"port={port}", "ssl=on", f"ssl_cert_file={pem}", f"ssl_key_file={pem}",
    )  # fmt: skip
    rules = "local all all scram-sha-256\nhostssl all all 127.0.0.1/32 scram-sha-256\n"
    binaries = _require(_oldest_of_debian(), "Debian's postgresql")
    async with _server(binaries, folder, options=options, rules=rules, port=port) as server:
        yield f"postgresql://boss:{server.password}@127.0.0.1:{port}/millpond"


async def test_a_server_whose_certificate_fits_is_spoken_to_under_tls(
    address: str, folder: Path, trusted: Authority
) -> None:
    url = f"{address}?sslmode=verify-full&sslrootcert={authority_file(folder, trusted, 'ca')}"
    db = await Database.connect(url)
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener, hints = Listener(url, {WAKE: heard.put_nowait}), await Hints.connect(url)
    await listener.start()
    try:
        async with db.globals() as con:
            sql = "select bool_and(ssl) and count(*) > 1 from pg_stat_ssl join pg_stat_activity using (pid)"
            assert await con.fetchval(f"{sql} where client_addr is not null")
        hints.wake(["default"])
        assert await asyncio.wait_for(heard.get(), DEADLINE_S) == "default"
    finally:
        await hints.close()
        await listener.close()
        await db.close()


@pytest.mark.parametrize("other", ["authority", "name", "none"])
async def test_a_server_that_cannot_prove_itself_is_not_spoken_to(
    address: str, folder: Path, trusted: Authority, other: str
) -> None:
    signer = Authority.make("other") if other == "authority" else trusted
    url = f"{address}?sslmode=verify-full&sslrootcert={authority_file(folder, signer, 'ca')}"
    if other == "name":
        url = url.replace("@127.0.0.1:", "@localhost:")
    if other == "none":
        url = f"{address}?sslmode=disable"
    with pytest.raises((MillpondError, asyncpg.PostgresError, OSError)):
        await Database.connect(url)
