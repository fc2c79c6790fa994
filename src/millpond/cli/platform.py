"""The platform on one machine: database, API and workers, started and ended in order.

Called by `up` and `demo`. Invariants: API and workers are processes of their own, so that a killed
worker leaves the API alive; whatever happens, what was started here is ended here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO

import structlog

from millpond.cli.config import (
    Databases,
    child_environment,
    external_databases,
    is_loopback,
    queue_slots,
)
from millpond.cli.devtoken import DevToken, mint_dev_token
from millpond.cli.key_ring import open_ring
from millpond.cli.limit_settings import read_limits
from millpond.cli.listening import address, listen
from millpond.cli.remote import Remote
from millpond.cli.running import forget_running, note_running
from millpond.cli.supervise import Child, Supervisor
from millpond.cli.workers import WORKER_STAGE, worker_children
from millpond.db.embedded import EmbeddedPostgres
from millpond.db.migrate import check_schema, migrate
from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.errors import InvalidInput, Transient, Unavailable
from millpond.settings import Settings

_log = structlog.get_logger("millpond.up")
_SQL = queries("status")

API_GRACE_S = 8.0
_READY_S = 90.0
MAIL_FILE = "mail.txt"
_POLL_S = 0.05


@dataclass(kw_only=True)
class Platform:
    """A running platform; `token` is None with an external database."""

    url: str
    databases: Databases
    supervisor: Supervisor
    api: Child
    workers: Sequence[Child]
    token: DevToken | None
    server: EmbeddedPostgres | None

    @property
    def worker(self) -> Child:
        """The first worker process."""
        return self.workers[0]

    @property
    def is_embedded(self) -> bool:
        """Whether the database is this platform's own."""
        return self.server is not None

    def kill(self) -> None:
        """End every process at once; Postgres recovers from that at its next start."""
        self.supervisor.kill()
        if self.server is not None and self.server.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.server.pid, signal.SIGQUIT)


@asynccontextmanager
async def platform(
    settings: Settings,
    *,
    stop: asyncio.Event,
    log_file: IO[bytes] | None = None,
    show_links: bool = False,
) -> AsyncIterator[Platform]:
    """Start everything; yield once the API answers and a worker is there, or `stop` is set.

    With `show_links`, links in mail that is written to a file are shown where stdout is a terminal.
    The end comes with the block's: API (no new work), workers (they drain), Postgres.
    """
    queue_slots(settings)
    read_limits(settings)
    external = external_databases(settings)
    _refuse_exposed(settings, is_embedded=external is None)
    async with contextlib.AsyncExitStack() as stack:
        if external is not None:
            await _check_external(settings, external)
            made = await _prepare(settings, external, stack, log_file)
        else:
            made = await _prepare_embedded(settings, stack, log_file)
            if show_links:
                made.api.arguments = [*made.api.arguments, "--show-links"]
        await made.supervisor.start(made.api)
        for worker in made.workers:
            await made.supervisor.start(worker)
        await _until_ready(made, stop)
        yield made


async def _prepare_embedded(
    settings: Settings, stack: contextlib.AsyncExitStack, log_file: IO[bytes] | None
) -> Platform:
    """Start Postgres, migrate it, mint the development token, prepare the processes."""
    server = EmbeddedPostgres(settings.data_dir, owner_note="millpond up")
    urls = await server.start()
    stack.push_async_callback(server.stop)
    databases = Databases(app=urls.app, engine=urls.engine, owner=urls.owner, listen=None)
    applied = await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
    if applied:
        _log.info("migrated", revisions=applied)
    made = await _prepare(settings, databases, stack, log_file)
    made.server = server
    made.api.environment = {
        **made.api.environment,
        **_local_mail(settings, made.url),
        **_only_limits(settings),
    }
    made.token = await mint_dev_token(settings, databases)
    note_running(settings.data_dir, made.url, databases)
    stack.callback(forget_running, settings.data_dir)
    return made


def _local_mail(settings: Settings, url: str) -> dict[str, str]:
    """Return what lets the API write mail to a file of this folder, unless a mail server is set."""
    named = {"MILLPOND_PUBLIC_URL": settings.public_url or url}
    if settings.smtp_url is None:
        named["MILLPOND_MAIL_FILE"] = str(settings.mail_file or settings.data_dir / MAIL_FILE)
    return named


def _only_limits(settings: Settings) -> dict[str, str]:
    """Return what takes away limits of earlier settings, where these have none: nobody else has a say here."""
    is_unset = settings.limits is None and settings.limits_file is None
    return {"MILLPOND_LIMITS": ""} if is_unset else {}


async def _prepare(
    settings: Settings,
    databases: Databases,
    stack: contextlib.AsyncExitStack,
    log_file: IO[bytes] | None,
) -> Platform:
    """Take the port and describe the processes; nothing runs yet."""
    listener = stack.enter_context(await listen(settings.host, settings.port))
    supervisor = Supervisor(log_file=log_file)
    stack.push_async_callback(supervisor.end)
    environment = child_environment(settings, databases)
    api = Child(
        name="api",
        arguments=["api", "--socket-fd", str(listener.fileno())],
        environment=environment,
        grace_s=API_GRACE_S,
        descriptors=[listener.fileno()],
        stage=WORKER_STAGE - 1,
    )
    return Platform(
        url=address(listener),
        databases=databases,
        supervisor=supervisor,
        api=api,
        workers=worker_children(settings, environment),
        token=None,
        server=None,
    )


async def _until_ready(made: Platform, stop: asyncio.Event) -> None:
    """Return when the API is ready and the workers have announced themselves, or `stop` is set."""
    until = time.monotonic() + _READY_S
    db = await Database.connect(made.databases.app, name="millpond-up", max_size=1)
    try:
        async with Remote.connect(made.url, None) as remote:
            while not (await _api_is_ready(remote) and await _are_announced(db, made.workers)):
                made.supervisor.raise_if_failed()
                if stop.is_set():
                    return
                if time.monotonic() > until:
                    raise Unavailable(f"API and workers did not get ready in {_READY_S:.0f} s.")
                await asyncio.sleep(_POLL_S)
    finally:
        await db.close()


async def _api_is_ready(remote: Remote) -> bool:
    try:
        await remote.get("/readyz")
    except Transient:
        return False
    return True


async def _are_announced(db: Database, workers: Sequence[Child]) -> bool:
    return all([await is_announced(db, worker) for worker in workers])


async def is_announced(db: Database, worker: Child) -> bool:
    """Whether the worker process has published its flows and is alive by the database's clock."""
    if worker.pid is None:
        return False
    async with db.globals() as con:
        return bool(await con.fetchval(_SQL["worker_is_live"], socket.gethostname(), worker.pid))


async def _check_external(settings: Settings, databases: Databases) -> None:
    """Refuse to start on a database whose schema is not this code's, or whose key is not this host's."""
    databases.need_engine()
    await check_schema(databases.app)
    db = await Database.connect(databases.app, name="millpond-up", max_size=1)
    try:
        await open_ring(settings, db)
    finally:
        await db.close()


def _refuse_exposed(settings: Settings, *, is_embedded: bool) -> None:
    if is_embedded and not is_loopback(settings.host):
        raise InvalidInput(
            f"`millpond up` with its own database listens on this machine only, not on "
            f"{settings.host}: it makes a development token with full rights",
            param="MILLPOND_HOST",
            advice="Leave MILLPOND_HOST at 127.0.0.1, or set MILLPOND_DATABASE_URL.",
        )
