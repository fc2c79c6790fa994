"""Migrations: makes roles and schema, applies the numbered SQL files, compares schema and code.

Called by `cli` (`migrate`, and `up` for the embedded database) and by every start through
`check_schema`. Invariants: a file `migrations/NNNN_name.sql` is revision NNNN; it and the note that it
ran are one transaction; two migrations of one database never overlap; one that waits for a table longer than some
seconds lets those behind it go first, and is tried again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from types import ModuleType
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

import asyncpg
import structlog
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory
from sqlalchemy import Connection as SyncConnection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from millpond.db.translate import translated
from millpond.errors import Permanent, SchemaMismatch, Unavailable

_log = structlog.get_logger("millpond.migrate")
_Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

SCHEMA = "millpond"
APP_ROLE = "millpond_app"
ENGINE_ROLE = "millpond_engine"
SEARCH_PATH = "millpond, public"
# A host that lost its network says nothing more, and a session that waits for it in the middle of an exchange, where no
# other time limit holds, would keep its locks for hours: so it is asked whether it is there, and given up after 8 s.
_HOST_IS_GONE = {
    "tcp_keepalives_idle": "4",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "2",
    "tcp_user_timeout": "8s",
}
# Kept with the roles, not the database, so that they hold for copies and restored dumps.
ROLE_SETTINGS: dict[str, dict[str, str]] = {
    APP_ROLE: {
        "search_path": SEARCH_PATH,
        "idle_in_transaction_session_timeout": "60s",
        # Requests and steps wait for no lock and no search longer than this.
        "statement_timeout": "60s",
        **_HOST_IS_GONE,
    },
    ENGINE_ROLE: {
        "search_path": SEARCH_PATH,
        # A stopped worker must not keep the claim's lock or a row's: its session ends, they with it.
        "idle_in_transaction_session_timeout": "3s",
        # As long as the engine itself waits for an answer, also where it was stopped meanwhile.
        "statement_timeout": "30s",
        **_HOST_IS_GONE,
        # The engine's statements are few and go by keys. Their plans are made once, when tables may
        # be nearly empty; these costs make touching a row dear and finding one by its key cheap, so
        # that such a plan holds at any size.
        "plan_cache_mode": "force_generic_plan",
        "enable_seqscan": "off",
        "enable_hashjoin": "off",
        "enable_mergejoin": "off",
        # What is looked up once is not to be remembered: that costs more than the look.
        "enable_memoize": "off",
        "jit": "off",
        "random_page_cost": "0.1",
        "cpu_tuple_cost": "1",
        "cpu_operator_cost": "0.1",
    },
}
# Whether the current role could get at what row-level security keeps from it: by itself, by what it owns, or by a role
# that it is in. The engine's role is let in by policies, so nothing but itself may be in it.
_UNBOUND = """
with mine as (
  select oid, rolname, rolsuper, rolbypassrls, rolcreaterole from pg_roles
  where pg_has_role(current_user, oid, 'member')
)
select exists (select from mine where rolsuper or rolbypassrls or rolcreaterole)
    or exists (select from pg_class c join mine m on m.oid = c.relowner
               where c.relnamespace = to_regnamespace($1) and c.relkind in ('r', 'p', 'v', 'm'))
    or exists (select from pg_proc p join mine m on m.oid = p.proowner where p.pronamespace = to_regnamespace($1))
    or (select count(*) from mine where rolname in ($2, $3)) > 1
"""
VERSION_TABLE = "schema_revision"
EXTENSIONS = ("vector", "pg_trgm", "unaccent")
# Any number that other users of advisory locks in this database do not take.
MIGRATION_LOCK = 0x6D696C6C706F6E64
_FILE = re.compile(r"^(\d{4})_\w+\.sql$")
_BUSY = "migration_waits"
# Who holds tables of the schema just now, the first of them.
_HOLDERS = """
select array(select distinct l.pid from pg_locks l join pg_class c on c.oid = l.relation
             where l.granted and l.pid <> pg_backend_pid() and c.relnamespace = to_regnamespace($1)
               and l.database = (select d.oid from pg_database d where d.datname = current_database())
             order by 1 limit 5)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a migration waits for each lock, how often it is tried, and how long others go first between."""

    lock_s: float = 3.0
    tries: int = 10
    pause_s: float = 3.0


def revisions() -> list[str]:
    """Return the numbers of this code's migrations, oldest first."""
    return [path.name[:4] for path in _migration_files(_folder())]


def _folder() -> Path:
    with as_file(files("millpond.db") / "migrations") as folder:
        return folder


def _migration_files(folder: Path) -> list[Path]:
    """List the numbered files; raises ValueError when two share a number."""
    found = sorted(path for path in folder.iterdir() if _FILE.match(path.name))
    numbers = [path.name[:4] for path in found]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"two migrations share a number: {numbers}")
    return found


class _SqlFiles(ScriptDirectory):
    """Alembic's chain of revisions, read from numbered SQL files in place of Python modules."""

    def _load_revisions(self) -> Iterator[Script]:
        down: str | None = None
        for path in _migration_files(Path(self.dir)):
            revision = path.name[:4]
            module = ModuleType(path.stem)
            module.__dict__.update(
                revision=revision, down_revision=down, upgrade=_upgrade_by(path), __doc__=path.name
            )
            yield Script(module, revision, path)
            down = revision


def _upgrade_by(path: Path) -> Callable[..., None]:
    """Return Alembic's upgrade function for one file; the driver runs its statements as one text."""

    def upgrade(*, connection: SyncConnection) -> None:
        lock_ms = int(connection.info["lock_s"] * 1000)
        connection.exec_driver_sql(f"set local search_path = {SEARCH_PATH}")
        connection.exec_driver_sql(f"set local lock_timeout = {lock_ms}")
        driver = connection.connection.driver_connection
        assert driver is not None
        try:
            await_only(driver.execute(path.read_text(encoding="utf-8")))
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            raise Unavailable(
                f"Migration {path.name} waits for tables that other transactions hold; it changed nothing.",
                code=_BUSY,
            ) from error
        except asyncpg.PostgresError as error:
            raise Permanent(
                f"Migration {path.name} failed and changed nothing: {error}",
                code="migration_failed",
            ) from error

    return upgrade


async def migrate(
    owner_url: str, *, app_url: str, engine_url: str, patience: Patience | None = None
) -> list[str]:
    """Bring the database up to this code; returns the numbers of the migrations that ran.

    The owner needs `create` on the database and, when the two roles do not exist, `createrole`.
    Raises SchemaMismatch when a newer Millpond migrated the database, Unavailable when others hold a table for longer
    than its `patience`: those that ran before stay, the others are left for the next time.
    """
    with translated(connecting=True):
        con = await asyncpg.connect(owner_url, timeout=10)
    try:
        with translated():
            await con.execute("select pg_advisory_lock($1)", MIGRATION_LOCK)
            await _ensure_role(con, APP_ROLE, _password(app_url))
            await _ensure_role(con, ENGINE_ROLE, _password(engine_url))
            await _ensure_extensions(con)
            await con.execute(f"create schema if not exists {SCHEMA}")
            return await _upgrade(con, owner_url, patience or Patience())
    finally:
        await con.close()


async def _ensure_role(con: _Connection, role: str, password: str) -> None:
    """Make `role` when it is missing, and give it the settings that it lacks."""
    row = await con.fetchrow("select rolconfig from pg_roles where rolname = $1", role)
    if row is None:
        literal = await con.fetchval("select quote_literal($1::text)", password)
        await _administer(con, f"create role {role} login", f" password {literal}")
    kept = (row and row["rolconfig"]) or []
    for name, value in ROLE_SETTINGS[role].items():
        quoted = value if name == "search_path" else f"'{value}'"
        if f"{name}={value}" not in kept:
            await _administer(con, f"alter role {role} set {name} = {quoted}")


async def _ensure_extensions(con: _Connection) -> None:
    """Make the extensions that this server has and this database lacks."""
    for extension in EXTENSIONS:
        missing = await con.fetchval(
            "select installed_version is null from pg_available_extensions where name = $1",
            extension,
        )
        if missing:
            await _administer(con, f"create extension if not exists {extension} schema public")


async def _administer(con: _Connection, statement: str, secret_part: str = "") -> None:
    """Run what a plain owner may lack the right for; the error says what to have run instead."""
    try:
        await con.execute(statement + secret_part)
    except asyncpg.InsufficientPrivilegeError as error:
        raise Permanent(
            f"The owner role may not run `{statement}`.",
            code="database_privilege",
            advice="Have an administrator of the database run it, then migrate again.",
        ) from error


def _password(url: str) -> str:
    return unquote(urlsplit(url).password or "")


async def _upgrade(con: _Connection, owner_url: str, patience: Patience) -> list[str]:
    """Run what is missing through Alembic; `con` holds the migration lock meanwhile."""
    before = await _applied(con)
    _refuse_newer(before)
    for nth in range(1, patience.tries + 1):
        try:
            await _try(owner_url, patience.lock_s)
            break
        except Unavailable as error:
            if error.code != _BUSY:
                raise
            pids = ", ".join(map(str, await con.fetchval(_HOLDERS, SCHEMA))) or "gone by now"
            if nth == patience.tries:
                raise Unavailable(
                    f"{error.message} It was tried {nth} times, for {patience.lock_s:g} s each.",
                    code=_BUSY,
                    advice=f"End what holds them (dumps, reports, forgotten transactions; sessions {pids}), "
                    "then migrate again.",
                ) from error
            _log.warning("migration.waits", error=error.message, sessions=pids, tries=nth)
            await asyncio.sleep(patience.pause_s)
    await con.execute(
        f"grant usage on schema {SCHEMA} to {APP_ROLE}, {ENGINE_ROLE};"
        f"grant select on {SCHEMA}.{VERSION_TABLE} to {APP_ROLE}, {ENGINE_ROLE}"
    )
    return [revision for revision in revisions() if before is None or revision > before]


async def _try(owner_url: str, lock_s: float) -> None:
    async def connect() -> _Connection:
        return await asyncpg.connect(owner_url, timeout=10)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(_run_alembic, lock_s)


def _run_alembic(connection: SyncConnection, lock_s: float) -> None:
    connection.info["lock_s"] = lock_s
    script = _SqlFiles(_folder())
    context = MigrationContext.configure(
        connection=connection,
        opts={
            "fn": lambda heads, _: script._upgrade_revs("heads", heads),
            "script": script,
            "version_table": VERSION_TABLE,
            "version_table_schema": SCHEMA,
            "transaction_per_migration": True,
        },
    )
    with context.begin_transaction():
        context.run_migrations(connection=connection)


async def check_schema(url: str) -> None:
    """Raise SchemaMismatch unless the database is exactly as new as this code.

    `url` is that of a role that serves, which must not be one that row-level security passes over.
    """
    with translated(connecting=True):
        con = await asyncpg.connect(url, timeout=10)
    try:
        with translated():
            applied = await _applied(con)
            is_unbound = await con.fetchval(_UNBOUND, SCHEMA, APP_ROLE, ENGINE_ROLE)
    finally:
        await con.close()
    _refuse_newer(applied)
    if applied != revisions()[-1]:
        raise SchemaMismatch(
            "The database has no Millpond schema."
            if applied is None
            else f"The database is at migration {applied}, this code needs {revisions()[-1]}.",
            code="schema_older",
            advice="Run `millpond migrate`.",
        )
    if is_unbound:
        raise Permanent(
            "This database role can pass over row-level security: it is a superuser, owns tables, or is a "
            "member of a role that may read every organization's rows.",
            code="role_too_powerful",
            advice=f"Serve as {APP_ROLE} and {ENGINE_ROLE}.",
        )


def _refuse_newer(applied: str | None) -> None:
    if applied is not None and applied not in revisions():
        raise SchemaMismatch(
            f"The database is at migration {applied}, which this code does not know: this "
            "database was migrated by a newer Millpond; upgrade the code.",
            code="schema_newer",
            advice="Upgrade the code.",
        )


async def _applied(con: _Connection) -> str | None:
    """Return the number of the last migration that ran, None when none did."""
    try:
        number: str | None = await con.fetchval(
            f"select max(version_num) from {SCHEMA}.{VERSION_TABLE}"  # noqa: S608 - constants
        )
    except (
        asyncpg.UndefinedTableError,
        asyncpg.InvalidSchemaNameError,
        asyncpg.InsufficientPrivilegeError,
    ):
        return None
    return number
