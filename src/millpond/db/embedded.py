"""Embedded Postgres: one private server per data directory, reached by a unix socket only.

Called by `cli` (up, worker, migrate, doctor) and the tests. Invariant: at most one live process holds
the lock of a data directory; only that one starts, adopts or stops its server.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ParamSpec, TypeVar
from urllib.parse import quote

import asyncpg
import psutil

from millpond.db import server_process
from millpond.db.migrate import APP_ROLE, ENGINE_ROLE, EXTENSIONS
from millpond.db.server_home import WHEEL, ServerHome, open_home, server_binaries
from millpond.db.server_process import Server
from millpond.db.translate import translated
from millpond.errors import Conflict, Permanent, Unavailable

P = ParamSpec("P")
R = TypeVar("R")

OWNER = "millpond_owner"
PASSWORD_FILES = {OWNER: "owner", APP_ROLE: "app", ENGINE_ROLE: "engine"}
DATABASE = "millpond"
# What a server says while it starts, recovers or shuts down.
NOT_YET = (asyncpg.CannotConnectNowError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)
# Recovery after a crash replays up to `max_wal_size` before the first connection is let in.
START_S = 300.0
POLL_S = 0.01
# As much of the log as there is files for at first: whoever comes to the end of these waits 20 ms for the next one to
# be filled with zeros, up to the first checkpoint. From then on files are used again.
READY_WAL_SEGMENTS = 16

SERVER_OPTIONS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u %a ",
    "lc_messages": "C",
    # Details of errors quote rows, which may hold what users wrote.
    "log_error_verbosity": "terse",
    # A statement whose client is gone ends, with its locks.
    "client_connection_check_interval": "5s",
    "password_encryption": "scram-sha-256",
    # Durability is the promise of a 202.
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    # A queue rewrites the same few pages: few checkpoints, spread out, keep full-page images rare. Compressing
    # those costs more (by pglz, all that this build has) than writing them.
    "wal_compression": "off",
    "max_wal_size": "4GB",
    "min_wal_size": "512MB",
    "wal_buffers": "16MB",
    "checkpoint_timeout": "15min",
    "checkpoint_completion_target": "0.9",
    # Dead rows of the hot tables are what slows a queue.
    "autovacuum_naptime": "5s",
    "autovacuum_max_workers": "4",
    # Local disks of today; the default is for spinning ones.
    "random_page_cost": "1.1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Urls:
    """Addresses of one database, one per role."""

    owner: str
    app: str
    engine: str


class EmbeddedPostgres:
    """The server of one data directory: started, adopted and stopped under a lock.

    `owner_note` tells others who holds it ("millpond up"); `options` replace server options.
    """

    def __init__(
        self, data_dir: Path, *, owner_note: str = "", options: Mapping[str, str] | None = None
    ) -> None:
        self.data_dir = data_dir.absolute()
        self._note = owner_note or "another Millpond process"
        self._options = {**_memory_options(), **SERVER_OPTIONS, **(options or {})}
        self._lock: IO[str] | None = None
        self._home: ServerHome | None = None
        self._server: Server | None = None

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, None when stopped."""
        return self._server.pid if self._server else None

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.data_dir / "postgres" / "server.log"

    @property
    def is_alive(self) -> bool:
        """Whether the server that `start` returned still runs."""
        return self._server is not None and self._server.is_alive()

    async def start(self) -> Urls:
        """Start the server, or adopt the one that a killed holder left; makes the database.

        The roles of the application and the engine are made by `migrate`. Raises Conflict naming
        the process when another one holds this data directory.
        """
        if self._lock is not None:
            raise Conflict(f"The embedded database in {self.data_dir} is started already.")
        home = await asyncio.to_thread(open_home, self.data_dir)
        self._lock = _take_lock(home.root / "lock", self._note)
        self._home = home
        try:
            with translated(connecting=True):
                await self._run(home)
                await self._prepare(home)
        except BaseException:
            await self.stop()
            raise
        return self.urls(DATABASE)

    async def stop(self) -> None:
        """Stop the server and give the data directory free; does nothing when not started."""
        if self._server is not None:
            await server_process.stop(self._server)
            self._server = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def stop_left_over(self) -> None:
        """Stop a server whose holder was killed; raises Conflict when it is in use."""
        home = await asyncio.to_thread(open_home, self.data_dir)
        lock = _take_lock(home.root / "lock", self._note)
        try:
            left = await asyncio.to_thread(server_process.find_server, home)
            if left is not None:
                await server_process.stop(left)
        finally:
            lock.close()

    def urls(self, database: str) -> Urls:
        """Return the addresses of a database on this server."""
        return Urls(
            owner=self._url(OWNER, database),
            app=self._url(APP_ROLE, database),
            engine=self._url(ENGINE_ROLE, database),
        )

    def admin_url(self, database: str) -> str:
        """Return the superuser's address: backups and the doctor, never the running product."""
        return self._url("postgres", database)

    def _url(self, role: str, database: str) -> str:
        if self._home is None:
            raise Conflict("The embedded database is not started.")
        secret = self._home.password(PASSWORD_FILES.get(role, "superuser"))
        host = quote(str(self._home.sockets), safe="")
        return f"postgresql://{role}:{secret}@/{database}?host={host}&port=5432"

    async def _run(self, home: ServerHome) -> None:
        """Adopt or start the server; a left one that was just shutting down is started anew."""
        binaries = await _finish_thread(server_binaries, home)
        if not home.is_initialised:
            is_durable = self._options["fsync"] != "off"
            await _finish_thread(server_process.initialise, binaries, home, is_durable)
        _refuse_other_major(home)
        command = server_process.command_line(binaries, home, self._options)
        left = await _finish_thread(server_process.find_server, home)
        if left is not None and left.was_started_by(command):
            self._server = left
            if await self._becomes_ready(left):
                return
        elif left is not None:
            await server_process.stop(left)
        self._server = server_process.spawn(command, home)
        if not await self._becomes_ready(self._server):
            raise Permanent(
                f"Embedded Postgres ended while it started: {_last_lines(home.log)}",
                code="embedded_postgres",
                advice=f"See {home.log}.",
            )

    async def _becomes_ready(self, server: Server) -> bool:
        """Wait until the superuser is let in; False when the server ended instead."""
        url = self.admin_url("postgres")
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if not server.is_alive():
                return False
            with contextlib.suppress(OSError, *NOT_YET):
                con = await asyncpg.connect(url, timeout=5)
                await con.close()
                return True
            await asyncio.sleep(POLL_S)
        raise Unavailable(f"Embedded Postgres is not ready after {START_S:.0f} s; see {self.log}.")

    async def _prepare(self, home: ServerHome) -> None:
        """Make the owner, the database and its extensions where they are missing.

        The password files are the truth: a role that exists gets the password of its file.
        """
        silent = {"log_min_error_statement": "panic"}
        con = await asyncpg.connect(self.admin_url("postgres"), server_settings=silent)
        try:
            found = {row[0] for row in await con.fetch("select rolname from pg_roles")}
            if OWNER not in found:
                await con.execute(f"create role {OWNER} login createrole createdb")
            for role in {OWNER, *found} & PASSWORD_FILES.keys():
                secret = home.password(PASSWORD_FILES[role])
                await con.execute(f"alter role {role} password '{secret}'")
            if not await con.fetchval("select 1 from pg_database where datname = $1", DATABASE):
                await con.execute(f"create database {DATABASE} owner {OWNER}")
                if self._options["fsync"] != "off":
                    await _make_wal_ready(con)
        finally:
            await con.close()
        con = await asyncpg.connect(self.admin_url(DATABASE))
        try:
            for extension in EXTENSIONS:
                await con.execute(f"create extension if not exists {extension} schema public")
        finally:
            await con.close()


async def _make_wal_ready(con: asyncpg.Connection[asyncpg.Record]) -> None:
    """Make the files, of 16 MiB each, into which the log goes next: a checkpoint keeps those that are done with."""
    for _ in range(READY_WAL_SEGMENTS):
        await con.execute("select pg_logical_emit_message(false, 'ready', '')")
        await con.execute("select pg_switch_wal()")
    await con.execute("checkpoint")


async def _finish_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `function` in a thread and wait for its end even when cancelled.

    Otherwise the lock would be given up while the thread still works on the data directory.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def _take_lock(path: Path, note: str) -> IO[str]:
    """Lock the data directory for this process; raises Conflict naming the one that holds it.

    The lock ends with the process, however it ends. A forked child must not keep it alive.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = file.read().strip() or "another process"
        file.close()
        raise Conflict(
            f"The database in {path.parent.parent} is in use by {holder}.",
            code="already_running",
            advice="Stop that process, or name another --data-dir.",
        ) from error
    os.register_at_fork(after_in_child=file.close)
    file.truncate(0)
    file.write(f"process {os.getpid()} ({note})")
    file.flush()
    return file


def _refuse_other_major(home: ServerHome) -> None:
    """Raise Conflict when the cluster was made by another major version of Postgres."""
    made_by = (home.cluster / "PG_VERSION").read_text().strip()
    installed = importlib.metadata.version(WHEEL)
    if installed.split(".")[0] != made_by:
        raise Conflict(
            f"The database in {home.root} was made by Postgres {made_by}; {WHEEL} is {installed}.",
            advice=f"Install {WHEEL} {made_by}.*, or move the data by pg_dump and pg_restore.",
        )


def _memory_options() -> dict[str, str]:
    """Size the server by the memory that this machine or container has."""
    memory_bytes = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):
        memory_bytes = min(memory_bytes, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    shared_mb = max(32, min(512, memory_bytes // 2**20 // 8))
    return {
        "shared_buffers": f"{shared_mb}MB",
        "effective_cache_size": f"{max(64, memory_bytes // 2**20 // 2)}MB",
        "maintenance_work_mem": f"{max(32, min(256, shared_mb // 2))}MB",
    }


def _last_lines(log: Path) -> str:
    try:
        return " | ".join(log.read_text(errors="replace").splitlines()[-4:])
    except OSError:
        return "no log"
