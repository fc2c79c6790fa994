"""The schema: equal to the golden file, and no organization ever sees another's rows.

`pytest tests/db/test_schema.py --renew-golden` rewrites `tests/golden/schema.json`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest
import pytest_asyncio

from millpond.db.embedded import Urls
from millpond.db.pool import Database, EngineDatabase
from millpond.errors import MillpondError
from schema_dump import dump

APP, ENGINE, OWNER = "millpond_app", "millpond_engine", "millpond_owner"
# Tables that belong to no organization. A table in neither this set nor with an org_id fails.
GLOBAL_TABLES = {
    "org",
    "seal_key",
    "signing_key",
    "flow_version",
    "worker",
    "fair_clock",
    "schema_revision",
    "queue_pause",
    "platform_limit",
    "declared_limit",
    "limit_version",
    "limit_change",
    "room",
    "told_rooms",
    "crossing",
    "meter",
    "brake",
    "failing",
    "sampling",
    "fullness",
    "account",
    "login_session",
    "platform_audit",
    "refresh_token",
    "single_use_token",
    "auth_brake",
    "mail_outbox",
    "platform_audit_seal",
    "platform_audit_unsealed",
    "plan",
    "model_price",
    "usage_part",
    "rate_bucket",
}
IN_ORG = "(org_id = (NULLIF(current_setting('millpond.org'::text, true), ''::text))::bigint)"
OF_PLATFORM = {"plan", "model_price", "rate_bucket", "queue_pause"}
NO_ORG = "(NULLIF(current_setting('millpond.org'::text, true), ''::text) IS NULL)"
A_VALUE = {
    "bigint": "1",
    "integer": "1",
    "smallint": "1",
    "double precision": "1",
    "boolean": "false",
    "text": "'x'",
    "uuid": "gen_random_uuid()",
    "json": "'{}'",
    "jsonb": "'{}'",
    "bytea": "'x'",
    "timestamp with time zone": "now()",
    "interval": "'1 s'",
    "date": "now()",
    "text[]": "'{}'",
    "integer[]": "'{}'",
    "tsvector": "''",
    "inet": "'::1'",
}
TABLES = """
select c.relname from pg_class c
 where c.relnamespace = 'millpond'::regnamespace and c.relkind in ('r', 'p') order by 1
"""
NEEDED = """
select a.attname, format_type(a.atttypid, null) as type from pg_attribute a
 where a.attrelid = format('millpond.%I', $1::text)::regclass and a.attnum > 0
   and not a.attisdropped and a.attnotnull and a.attname <> 'org_id' and a.attidentity = ''
   and a.attgenerated = ''
   and not exists (select from pg_attrdef d where d.adrelid = a.attrelid and d.adnum = a.attnum)
 order by a.attnum
"""
CONSTRAINTS = """
select conrelid::regclass::text as table, conname from pg_constraint
 where connamespace = 'millpond'::regnamespace and contype in ('c', 'f')
"""


@pytest_asyncio.fixture
async def admin(admin_url: str) -> AsyncIterator[asyncpg.Connection]:
    con = await asyncpg.connect(admin_url)
    yield con
    await con.close()


async def tenant_tables(con: asyncpg.Connection) -> list[str]:
    names = [row["relname"] for row in await con.fetch(TABLES)]
    return [name for name in names if name not in GLOBAL_TABLES]


async def test_the_schema_is_the_golden_one(
    admin: asyncpg.Connection, golden: Callable[[str, str], None]
) -> None:
    golden("schema.json", await dump(admin))


async def test_every_table_is_of_an_org_or_known_to_be_global(admin: asyncpg.Connection) -> None:
    without = await admin.fetch(
        """select c.relname from pg_class c
            where c.relnamespace = 'millpond'::regnamespace and c.relkind in ('r', 'p')
              and not exists (select from pg_attribute a where a.attrelid = c.oid
                                 and a.attname = 'org_id' and a.attnotnull)"""
    )
    assert {row["relname"] for row in without} <= GLOBAL_TABLES


async def test_every_tenant_table_has_forced_row_security(admin: asyncpg.Connection) -> None:
    tables = await tenant_tables(admin)
    open_tables = await admin.fetch(
        """select relname from pg_class where relnamespace = 'millpond'::regnamespace
              and relname = any($1) and not (relrowsecurity and relforcerowsecurity)""",
        [*tables, "org"],
    )
    assert tables
    assert [row["relname"] for row in open_tables] == []


async def test_the_application_is_bound_to_its_org_by_policy(admin: asyncpg.Connection) -> None:
    """One policy per tenant table lets the application in: its own org, to read and to write.

    What is of the platform and can be changed by the application is changed without an org alone.
    """
    rows = await admin.fetch(
        """select tablename, policyname, permissive, roles::text[], cmd, qual, with_check
             from pg_policies where schemaname = 'millpond' and roles && array['public', $1]::name[]""",
        APP,
    )
    shared = [row for row in rows if row["tablename"] in OF_PLATFORM]
    assert {(row["tablename"], row["cmd"], row["qual"], row["with_check"]) for row in shared} == {
        one
        for table in OF_PLATFORM
        for one in ((table, "ALL", NO_ORG, NO_ORG), (table, "SELECT", "true", None))
    }
    orgs = [row for row in rows if row["tablename"] == "org"]
    own_or_none = f"({IN_ORG} OR {NO_ORG})"
    assert {(r["permissive"], r["cmd"], r["qual"], r["with_check"]) for r in orgs} == {
        ("PERMISSIVE", "ALL", own_or_none, own_or_none),
        ("RESTRICTIVE", "INSERT", None, NO_ORG),
    }
    tenant = [row for row in rows if row["tablename"] not in {*OF_PLATFORM, "org"}]
    wrong = [tuple(row) for row in tenant if (row["qual"], row["with_check"]) != (IN_ORG, IN_ORG)]
    assert wrong == []
    assert sorted(row["tablename"] for row in tenant) == await tenant_tables(admin)


async def test_org_id_comes_first_in_every_unique_index(admin: asyncpg.Connection) -> None:
    rows = await admin.fetch(
        """select i.indexrelid::regclass::text as index from pg_index i
            where i.indisunique and i.indrelid = any(
                    select format('millpond.%I', t)::regclass from unnest($1::text[]) t)
              and (select attname from pg_attribute a
                    where a.attrelid = i.indrelid and a.attnum = i.indkey[0]) is distinct from 'org_id'""",
        await tenant_tables(admin),
    )
    assert [row["index"] for row in rows] == []


async def test_org_id_comes_first_in_every_foreign_key(admin: asyncpg.Connection) -> None:
    """Foreign keys pass over policies: one without the org could point into another's rows."""
    rows = await admin.fetch(
        """select k.conrelid::regclass::text || '.' || k.conname as key from pg_constraint k
            where k.contype = 'f' and k.connamespace = 'millpond'::regnamespace
              and k.confrelid = any(
                    select format('millpond.%I', t)::regclass from unnest($1::text[]) t)
              and not (
                (select attname from pg_attribute a where a.attrelid = k.conrelid
                    and a.attnum = k.conkey[1]) = 'org_id'
                and (select attname from pg_attribute a where a.attrelid = k.confrelid
                    and a.attnum = k.confkey[1]) = 'org_id')
              and k.conrelid = any(
                    select format('millpond.%I', t)::regclass from unnest($1::text[]) t)""",
        await tenant_tables(admin),
    )
    assert [row["key"] for row in rows] == []


async def test_the_serving_roles_are_plain_and_own_nothing(admin: asyncpg.Connection) -> None:
    for role in (APP, ENGINE):
        row = await admin.fetchrow(
            """select rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication
                 from pg_roles where rolname = $1""",
            role,
        )
        assert row is not None
        assert not any(row.values()), role
        owned = "select count(*) from pg_class where relowner = $1::regrole"
        assert await admin.fetchval(owned, role) == 0
        for other in {APP, ENGINE, OWNER, "postgres"} - {role}:
            member = "select pg_has_role($1, $2, 'member')"
            assert not await admin.fetchval(member, role, other), (role, other)


async def test_functions_with_lent_rights_are_closed_and_fix_their_path(
    admin: asyncpg.Connection,
) -> None:
    rows = await admin.fetch(
        """select p.oid::regprocedure::text as name, p.proconfig, r.rolsuper or r.rolbypassrls as strong,
                  has_function_privilege('public', p.oid, 'execute') as is_open
             from pg_proc p join pg_roles r on r.oid = p.proowner
            where p.prosecdef and p.pronamespace = 'millpond'::regnamespace"""
    )
    for row in rows:
        assert not row["strong"], row["name"]
        assert not row["is_open"], row["name"]
        assert any(item.startswith("search_path=") for item in row["proconfig"] or []), row["name"]


async def fill(admin: asyncpg.Connection, orgs: tuple[int, int]) -> list[str]:
    """Put one row per org in every tenant table of this throwaway database."""
    await admin.execute("set search_path = millpond, public")
    # Without triggers, which would put rows of their own beside these.
    await admin.execute("set session_replication_role = replica")
    for row in await admin.fetch(CONSTRAINTS):
        await admin.execute(
            f'alter table {row["table"]} drop constraint "{row["conname"]}" cascade'
        )
    tables = await tenant_tables(admin)
    for table in tables:
        for org_id in orgs:
            await admin.execute(await an_insert(admin, table, org_id))
    return tables


async def an_insert(admin: asyncpg.Connection, table: str, org_id: int) -> str:
    needed = await admin.fetch(NEEDED, table)
    names = ", ".join(["org_id", *(f'"{row["attname"]}"' for row in needed)])
    values = ", ".join([str(org_id), *(A_VALUE[row["type"]] for row in needed)])
    return f"insert into {table} ({names}) values ({values})"


async def test_the_application_sees_and_changes_only_its_org(
    admin: asyncpg.Connection, db: Database, org: int, other_org: int
) -> None:
    """No WHERE anywhere: the database alone keeps the orgs apart."""
    seen = 0
    for table in await fill(admin, (org, other_org)):
        may = "select has_any_column_privilege($1, $2, $3)"
        if await admin.fetchval(may, APP, table, "select"):
            seen += 1
            async with db.org(org) as con:
                rows = await con.fetch(f"select org_id from {table}")
            assert [row["org_id"] for row in rows] == [org], table
            async with db.globals() as con:
                assert await con.fetch(f"select org_id from {table}") == [], table
        if await admin.fetchval(may, APP, table, "insert"):
            with pytest.raises(MillpondError) as caught:
                async with db.org(org) as con:
                    await con.execute(await an_insert(admin, table, other_org))
            assert caught.value.code == "database_privilege", table
        await assert_changes_own_row_only(admin, db, org, table)
        left = await admin.fetchval(f"select count(*) from {table} where org_id = $1", other_org)
        assert left == 1, table
    assert seen > 10


async def assert_changes_own_row_only(
    admin: asyncpg.Connection, db: Database, org: int, table: str
) -> None:
    column = await admin.fetchval(
        """select quote_ident(attname) from pg_attribute
            where attrelid = $1::text::regclass and attnum > 0 and not attisdropped
              and has_column_privilege($2, attrelid, attnum, 'update')
              and has_column_privilege($2, attrelid, attnum, 'select')
              and attname <> 'org_id' limit 1""",
        table,
        APP,
    )
    async with db.org(org) as con:
        if column is not None:
            assert await con.execute(f"update {table} set {column} = {column}") == "UPDATE 1", table
        if await admin.fetchval("select has_table_privilege($1, $2, 'delete')", APP, table):
            assert await con.execute(f"delete from {table}") == "DELETE 1", table


async def test_the_engine_serves_all_orgs_but_not_their_content(
    admin: asyncpg.Connection, engine_db: EngineDatabase, org: int, other_org: int
) -> None:
    """Documents and secrets are none of the engine's business."""
    closed = set()
    for table in await fill(admin, (org, other_org)):
        read = f"select org_id from {table} order by 1"
        if await admin.fetchval("select has_any_column_privilege($1, $2, 'select')", ENGINE, table):
            async with engine_db.duty("claim") as con:
                rows = await con.fetch(read)
            assert [row["org_id"] for row in rows] == sorted((org, other_org)), table
        else:
            closed.add(table)
            with pytest.raises(MillpondError) as caught:
                async with engine_db.duty("claim") as con:
                    await con.fetch(read)
            assert caught.value.code == "database_privilege", table
    assert {"knowledge_base", "document", "document_content", "chunk"} <= closed
    assert not {"run", "item", "ready", "lease", "step", "event"} & closed


async def test_both_roles_find_the_tables_without_naming_the_schema(urls: Urls) -> None:
    for url in (urls.app, urls.engine):
        con = await asyncpg.connect(url)
        assert await con.fetchval("select count(*) from flow_version") == 0
        assert await con.fetchval("select count(*) from schema_revision") == 1
        await con.close()
