"""Orgs are kept apart by the database alone: no statement without its WHERE, and no used connection, crosses.

What tables there are is read from the database, so that a new one is tested, or fails here, by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest
import pytest_asyncio
from tests.db.test_schema import A_VALUE, NEEDED, fill

from millpond.db.embedded import Urls
from millpond.db.migrate import check_schema
from millpond.db.pool import Connection, Database
from millpond.errors import MillpondError, Permanent

APP, ENGINE = "millpond_app", "millpond_engine"
ROUNDS = 250
# What the engine's role may never touch, whatever else it is given.
CLOSED = {
    "account",
    "login_session",
    "membership",
    "custom_role",
    "service_principal",
    "api_key",
    "access_grant",
    "outside_identity",
    "issuer",
    "issuer_rule",
    "signing_key",
    "knowledge_base",
    "document",
    "document_content",
    "document_text",
    "chunk",
}
# What stands in an org's row and is the platform's to change.
OF_PLATFORM = {
    "org": {
        "plan",
        "overrides",
        "features",
        "plan_changed_at",
        "suspended_at",
        "suspended_reason",
    },
}
CLOSED_WORDS = ("secret", "message", "session", "password", "token")
COLUMNS = """
select quote_ident(a.attname) as name, format_type(a.atttypid, null) as type,
       has_column_privilege($2, a.attrelid, a.attnum, 'select') as is_read,
       has_column_privilege($2, a.attrelid, a.attnum, 'update') as is_updated
from pg_attribute a
where a.attrelid = format('millpond.%I', $1::text)::regclass and a.attnum > 0 and not a.attisdropped
  and a.attgenerated = ''
order by a.attnum
"""
ENGINE_RIGHTS = """
select c.relname as table, p.privilege_type as privilege,
       case when has_table_privilege($1, c.oid, p.privilege_type) then '*'
            else (select string_agg(a.attname, ' ' order by a.attnum) from pg_attribute a
                  where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                    and p.privilege_type <> 'DELETE' and p.privilege_type <> 'TRUNCATE'
                    and has_column_privilege($1, c.oid, a.attnum, p.privilege_type)) end as columns
from pg_class c
cross join unnest(array['SELECT', 'INSERT', 'UPDATE', 'REFERENCES', 'DELETE', 'TRUNCATE']) as p(privilege_type)
where c.relnamespace = 'millpond'::regnamespace and c.relkind in ('r', 'p', 'v', 'm')
order by 1, 2
"""


@pytest_asyncio.fixture
async def admin(admin_url: str) -> AsyncIterator[asyncpg.Connection]:
    con = await asyncpg.connect(admin_url)
    yield con
    await con.close()


async def test_no_statement_without_its_where_touches_another_org(
    admin: asyncpg.Connection, db: Database, org: int, other_org: int
) -> None:
    """SELECT, INSERT, UPDATE of every column and DELETE, in each table with an `org_id`."""
    await fill(admin, (org, other_org))
    tables = [
        row["relname"]
        for row in await admin.fetch(
            """select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid
                where c.relnamespace = 'millpond'::regnamespace and c.relkind in ('r', 'p')
                  and a.attname = 'org_id' and not a.attisdropped
                  and c.relname <> all (array['worker', 'flow_version']) order by 1"""
        )
    ]
    touched: set[str] = set()
    for table in tables:
        rows = await admin.fetch(f"select distinct org_id from {table}")
        assert {row["org_id"] for row in rows} >= {org, other_org}, (
            f"{table} has no rows of two orgs: teach fill() of tests/db/test_schema.py to make one"
        )
        before = await _fingerprint(admin, table, other_org)
        touched |= await _try_all(admin, db, table, org, other_org)
        assert await _fingerprint(admin, table, other_org) == before, table
    assert {
        f"{verb} {table}" for verb in ("select", "insert") for table in ("run", "event")
    } <= touched
    assert {"update membership", "delete membership", "select chunk"} <= touched
    assert {"select org", "insert org", "update org"} <= touched


@pytest.mark.parametrize(
    "statement",
    [
        "insert into org (slug, name) values ('dam', 'Dam')",
        "update org set plan = 'unlimited'",
        "update org set overrides = '{}' where org_id = 1",
        "update org set features = '{}'",
        "update org set suspended_at = null",
        "update org set slug = 'dam'",
        "delete from org",
        "insert into queue_pause (queue, paused_by) values ('default', 'user:x')",
        "update account set is_operator = true",
        "update account set password_hash = 'x'",
        "insert into account (user_id, email, name, is_operator) values (gen_random_uuid(), 'x@x.example', 'x', true)",
        "insert into platform_limit (key, kind, maximum, set_by) values ('org:*', 'concurrency', 0, 'user:x')",
        "update platform_limit set maximum = 0",
        "delete from platform_limit",
        "insert into declared_limit select 'settings', '', key, kind, maximum from platform_limit",
        "update declared_limit set maximum = 0",
        "delete from declared_limit",
        "insert into signing_key values ('x', 'EdDSA', '{}', 'x', 'x')",
        "update signing_key set retired_at = now()",
        "insert into seal_key (key_id, is_current) values ('x', false)",
        "update seal_key set is_current = false",
    ],
)
async def test_an_orgs_transaction_changes_nothing_of_the_platform(
    db: Database, org: int, statement: str
) -> None:
    await _refused(db, org, statement)


async def test_an_orgs_transaction_lifts_no_pause_of_the_platform(db: Database, org: int) -> None:
    async with db.globals() as con:
        await con.execute("insert into queue_pause (queue, paused_by) values ('default', 'user:x')")
    async with db.org(org) as con:
        assert await con.fetchval("select count(*) from queue_pause") == 1
        assert await con.execute("delete from queue_pause") == "DELETE 0"


async def test_a_forgotten_where_renames_one_org(db: Database, org: int, other_org: int) -> None:
    """Whoever renames their org by a statement without its WHERE renames no other."""
    async with db.org(org) as con:
        assert await con.execute("update org set name = 'renamed'") == "UPDATE 1"
        seen = await con.fetch("select org_id, name from org")
    assert [(row["org_id"], row["name"]) for row in seen] == [(org, "renamed")]
    async with db.globals() as con:
        assert await con.fetchval("select name from org where org_id = $1", other_org) == "marsh"


async def _fingerprint(admin: asyncpg.Connection, table: str, org_id: int) -> list[str]:
    rows = await admin.fetch(
        f"select to_json(t)::text as row from {table} t where org_id = $1 order by 1", org_id
    )
    return [row["row"] for row in rows]


async def _try_all(
    admin: asyncpg.Connection, db: Database, table: str, org: int, other_org: int
) -> set[str]:
    """Try each verb that the application's role has; returns those, and fails where one crosses."""
    columns = await admin.fetch(COLUMNS, table, APP)
    readable = [one["name"] for one in columns if one["is_read"]]
    done: set[str] = set()
    if readable:
        done.add(f"select {table}")
        async with db.org(org) as con:
            for row in await con.fetch(f"select {', '.join(readable)} from {table}"):
                assert row["org_id"] == org, table
        async with db.globals() as con:
            seen = await con.fetch(f"select {', '.join(readable)} from {table}")
            # Without an org the platform works: it sees which orgs there are, and nothing of what they hold.
            assert {row["org_id"] for row in seen} == (
                {org, other_org} if table == "org" else set()
            )
    if await admin.fetchval("select has_any_column_privilege($1, $2, 'insert')", APP, table):
        done.add(f"insert {table}")
        await _refused(db, org, await _insert(admin, table, other_org))
    for one in columns:
        if one["is_updated"]:
            done.add(f"update {table}")
            to = str(other_org) if one["name"] == "org_id" else one["name"]
            if one["name"] == "org_id":
                await _refused(db, org, f"update {table} set org_id = {to}")
                continue
            if one["name"] in OF_PLATFORM.get(table, ()):
                await _refused(db, org, f"update {table} set {one['name']} = {to}")
                continue
            async with db.org(org) as con:
                status = await con.execute(f"update {table} set {one['name']} = {to}")
            assert status == "UPDATE 1", (table, one["name"])
    if await admin.fetchval("select has_table_privilege($1, $2, 'delete')", APP, table):
        done.add(f"delete {table}")
        with contextlib.suppress(_Undo):
            async with db.org(org) as con:
                assert await con.execute(f"delete from {table}") == "DELETE 1", table
                raise _Undo
    return done


class _Undo(Exception):
    """Rolls back what a test did."""


async def _insert(admin: asyncpg.Connection, table: str, org_id: int) -> str:
    needed = await admin.fetch(NEEDED, table)
    unknown = {row["type"] for row in needed} - A_VALUE.keys()
    assert not unknown, f"{table}: add values of {unknown} to A_VALUE of tests/db/test_schema.py"
    names = ", ".join(["org_id", *(f'"{row["attname"]}"' for row in needed)])
    values = ", ".join([str(org_id), *(A_VALUE[row["type"]] for row in needed)])
    return f"insert into {table} ({names}) values ({values})"


async def _refused(db: Database, org: int, statement: str) -> None:
    with pytest.raises(MillpondError) as caught:
        async with db.org(org) as con:
            await con.execute(statement)
    assert caught.value.code == "database_privilege", statement


async def _look(con: Connection, org_id: int) -> None:
    """See rows of one org alone."""
    rows = await con.fetch("select org_id, name from schedule")
    assert [(row["org_id"], row["name"]) for row in rows] == [(org_id, f"of {org_id}")]


async def _in_time(con: Connection) -> None:
    await con.execute("set local statement_timeout = 5")
    await con.execute("select pg_sleep(5)")


@contextlib.asynccontextmanager
async def _bare(db: Database) -> AsyncIterator[Connection]:
    """Lend a connection as it is between two transactions."""
    con = await db._lending.lend()
    try:
        yield con
    finally:
        await db._lending.take_back(con, is_clean=True)


async def _use(db: Database, org_id: int, end: str, started: asyncio.Event) -> None:
    async with db.org(org_id) as con:
        await _look(con, org_id)
        started.set()
        match end:
            case "error":
                raise _Undo
            case "refusal":
                await con.execute("select 1 / 0")
            case "timeout":
                await _in_time(con)
            case "cancel":
                await con.execute("select pg_sleep(30)")
            case "swallowed":
                with contextlib.suppress(asyncpg.PostgresError):
                    await con.execute("select 1 / 0")
        await _look(con, org_id)


async def _cancelled(using: asyncio.Task[None], started: asyncio.Event, turns: int | None) -> None:
    """Cancel a use: in its statement, or after some turns of the loop, wherever it is then."""
    if turns is None:
        await started.wait()
    else:
        for _ in range(turns):
            await asyncio.sleep(0)
    using.cancel()
    with contextlib.suppress(asyncio.CancelledError, MillpondError):
        await using


@pytest.mark.parametrize("seed", range(3))
async def test_one_connection_serves_orgs_in_turn_and_never_shows_the_others(
    urls: Urls, org: int, other_org: int, admin: asyncpg.Connection, seed: int
) -> None:
    """Errors, time limits and cancels end transactions anywhere; the next use is another org's."""
    for one in (org, other_org):
        await admin.execute(
            "insert into millpond.schedule (org_id, schedule_id, name, flow, input, cron, time_zone, created_by)"
            " values ($1, gen_random_uuid(), $2, 'f', 'null', '0 0 * * *', 'UTC', 'user:x')",
            one,
            f"of {one}",
        )
    chance = random.Random(seed)
    db = await Database.connect(urls.app, max_size=1)
    ends: dict[str, int] = {}
    try:
        for _ in range(ROUNDS // 3 + 1):
            end = chance.choice(
                ["well", "error", "refusal", "timeout", "cancel", "anywhere", "swallowed"]
            )
            ends[end] = ends.get(end, 0) + 1
            started = asyncio.Event()
            work = _use(db, chance.choice([org, other_org]), end, started)
            using = asyncio.create_task(work)
            if end in ("cancel", "anywhere"):
                await _cancelled(using, started, None if end == "cancel" else chance.randint(0, 12))
            else:
                with contextlib.suppress(MillpondError, _Undo):
                    await using
            async with _bare(db) as con:
                assert not await con.fetchval("select current_setting('millpond.org', true)"), end
                assert await con.fetch("select org_id from schedule") == [], end
            following = chance.choice([org, other_org])
            async with db.org(following) as con:
                await _look(con, following)
    finally:
        await db.close()
    assert len(ends) == 7


async def test_the_engines_rights_are_those_listed(
    admin: asyncpg.Connection, golden: Callable[[str, str], None]
) -> None:
    listed: dict[str, dict[str, str]] = {}
    for row in await admin.fetch(ENGINE_RIGHTS, ENGINE):
        if row["columns"]:
            listed.setdefault(row["table"], {})[row["privilege"]] = row["columns"]
    golden("engine_rights.json", json.dumps(listed, indent=1, sort_keys=True) + "\n")
    assert not CLOSED & listed.keys()
    assert not [one for one in listed if any(word in one for word in CLOSED_WORDS)]
    assert listed["audit"] == {"INSERT": "*"}


async def test_the_application_may_not_ask_for_rights_across_orgs(db: Database, org: int) -> None:
    await _refused(db, org, "select * from rights_now('{1}', '{user:x}', '{null}')")


TOO_MUCH = {
    "bypassrls": ("alter role millpond_app bypassrls", "alter role millpond_app nobypassrls"),
    "superuser": ("alter role millpond_app superuser", "alter role millpond_app nosuperuser"),
    "createrole": ("alter role millpond_app createrole", "alter role millpond_app nocreaterole"),
    "in the engine's role": (
        "grant millpond_engine to millpond_app",
        "revoke millpond_engine from millpond_app",
    ),
    "in a role that owns a table": (
        (
            "create role pond_keeper; alter table millpond.run owner to pond_keeper;"
            "grant pond_keeper to millpond_app"
        ),
        "alter table millpond.run owner to millpond_owner; drop owned by pond_keeper; drop role pond_keeper",
    ),
    "in a lending role": (
        "grant millpond_rights to millpond_app",
        "revoke millpond_rights from millpond_app",
    ),
    "owner of a table": (
        "alter table millpond.run owner to millpond_app",
        "alter table millpond.run owner to millpond_owner",
    ),
}


@pytest.mark.parametrize("what", TOO_MUCH)
async def test_a_start_is_refused_for_a_role_that_could_see_every_org(
    admin: asyncpg.Connection, urls: Urls, what: str
) -> None:
    give, take = TOO_MUCH[what]
    await check_schema(urls.app)
    await admin.execute(give)
    try:
        with pytest.raises(Permanent) as caught:
            await check_schema(urls.app)
        assert caught.value.code == "role_too_powerful"
    finally:
        await admin.execute(take)
    await check_schema(urls.app)
    await check_schema(urls.engine)
