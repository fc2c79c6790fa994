"""A Postgres in a network of its own, and two hosts that reach it over TCP, by password, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from tests.cli.conftest import clean_environment
from tests.hosts import machines
from tests.hosts.machines import Host, Network

from millpond.db.embedded import Urls
from millpond.db.migrate import migrate
from millpond.db.server_home import open_home, server_binaries
from millpond.identity.seal import KEY_BYTES

FLOWS = "tests.hosts.flows"
LEASE_S = 2.0
NAMES = ("anvil", "bellows")


@dataclass
class Site:
    """Two hosts and the database that is all they share."""

    folder: Path
    password: str
    key: bytes
    hosts: list[Host]

    def url(self, role: str, host: Host | None = None) -> str:
        """Return a role's address: from a host over TCP, from the test by the server's socket."""
        where = (
            f"@/millpond?host={self.folder}" if host is None else f"@{host.database}:5432/millpond"
        )
        return f"postgresql://{role}:{self.password}{where}"

    @property
    def urls(self) -> Urls:
        """The addresses by the server's socket."""
        return Urls(
            owner=self.url("boss"),
            app=self.url("millpond_app"),
            engine=self.url("millpond_engine"),
        )

    def environment(self, host: Host) -> dict[str, str]:
        """What an operator sets on a host."""
        return clean_environment(
            MILLPOND_DATABASE_URL=self.url("millpond_app", host),
            MILLPOND_ENGINE_DATABASE_URL=self.url("millpond_engine", host),
            MILLPOND_SECRET_KEY=base64.b64encode(self.key).decode(),
            MILLPOND_DATA_DIR="/tmp/millpond",
            MILLPOND_EMBEDDER="openai:unused",
            MILLPOND_LEASE_S=str(LEASE_S),
            MILLPOND_FLOWS=FLOWS,
        )


@pytest.fixture
def network() -> Iterator[Network]:
    """The database's network."""
    machines.need_hosts()
    with machines.network() as made:
        yield made


@pytest.fixture
def hosts(network: Network) -> Iterator[list[Host]]:
    """Two hosts."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(machines.host(name, number, network))
            for number, name in enumerate(NAMES, start=1)
        ]


@pytest.fixture
async def site(network: Network, hosts: list[Host], folder_of_module: Path) -> AsyncIterator[Site]:
    """A migrated Postgres that lets nobody in over TCP without a password."""
    home = open_home(folder_of_module / "data")
    account, binaries = home.account, server_binaries(home)
    assert account is not None
    folder = folder_of_module / "site"
    folder.mkdir()
    password = secrets.token_hex(16)
    secret = folder / "password"
    secret.write_text(password)
    for path in (folder, secret):
        shutil.chown(path, account.uid)
    run = [binaries / "initdb", "-D", folder / "data", "-U", "boss", "--auth=scram-sha-256"]
    run += ["--encoding=UTF8", f"--pwfile={secret}", "--no-sync"]
    subprocess.run(network.command(account.uid, *run), check=True, capture_output=True, cwd=folder)
    with (folder / "data" / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 10.99.0.0/16 scram-sha-256\n")
    listen = ",".join(host.database for host in hosts)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            network.command(
                account.uid, binaries / "postgres", "-D", folder / "data", "-k", folder,
                "-c", f"listen_addresses={listen}", "-c", "fsync=off",
            ),
            cwd=folder, stderr=log,
        )  # fmt: skip
    made = Site(folder, password, secrets.token_bytes(KEY_BYTES), hosts)
    try:
        await _prepare(made)
        yield made
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


async def _prepare(site: Site) -> None:
    async with asyncio.timeout(40):
        while True:
            try:
                con = await asyncpg.connect(site.url("boss").replace("/millpond?", "/postgres?"))
                break
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.1)
    await con.execute("create database millpond")
    await con.close()
    urls = site.urls
    await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)


@pytest.fixture
def urls(site: Site) -> Urls:
    """The site's database, which stands for that of other tests."""
    return site.urls
