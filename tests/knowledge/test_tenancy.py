"""Knowledge under row-level security: other orgs, the engine's role, the text-search function."""

from __future__ import annotations

import asyncpg
import pytest

from knowledge.conftest import Ingest, Upload
from millpond.db.embedded import Urls
from millpond.db.pool import Database
from millpond.errors import NotFound
from millpond.knowledge.store import KnowledgeStore

TABLES = ("knowledge_base", "document", "document_content", "document_text", "chunk")


async def test_another_org_sees_and_changes_nothing(
    db: Database,
    store: KnowledgeStore,
    org: int,
    other_org: int,
    upload: Upload,
    ingest: Ingest,
) -> None:
    document_id = await upload("a.md", "# Boats\n\nA canoe floats.\n")
    await ingest(document_id)
    base_id = (await store.bases(org))[0].id
    async with db.org(other_org) as con:
        for table in TABLES:
            assert await con.fetchval(f"select count(*) from {table}") == 0
            assert await con.execute(f"delete from {table}") == "DELETE 0"
        found = await con.fetch("select * from search_text($1, 'canoe', 10)", base_id)
        assert found == []
    async with db.org(org) as con:
        assert len(await con.fetch("select * from search_text($1, 'canoe', 10)", base_id)) == 1
    async with db.globals() as con:
        assert await con.fetch("select * from search_text($1, 'canoe', 10)", base_id) == []
    with pytest.raises(NotFound):
        await store.search(other_org, "support", "canoe")
    with pytest.raises(NotFound):
        await store.remove_document(other_org, document_id)


async def test_rows_of_another_org_cannot_be_written(
    db: Database, store: KnowledgeStore, org: int, other_org: int
) -> None:
    with pytest.raises(Exception, match="may not do this"):
        async with db.org(other_org) as con:
            await store.ensure_base(con, org, "support")


async def test_engine_role_has_no_right_on_knowledge(urls: Urls) -> None:
    con = await asyncpg.connect(urls.engine)
    try:
        for statement in [
            *(f"select 1 from {table}" for table in TABLES),
            "select * from search_text(null, 'a', 1)",
        ]:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await con.fetch(statement)
    finally:
        await con.close()


async def test_every_key_and_reference_begins_with_the_org(admin_url: str) -> None:
    con = await asyncpg.connect(admin_url)
    try:
        keys = await con.fetch(
            """
            select c.conrelid::regclass::text as of_table, c.conname, a.attname
            from pg_constraint c
            join pg_attribute a on a.attrelid = c.conrelid and a.attnum = c.conkey[1]
            where c.contype in ('p', 'u', 'f')
              and c.conrelid = any($1::text[]::regclass[])
            """,
            [f"millpond.{table}" for table in TABLES],
        )
        forced = await con.fetchval(
            "select bool_and(relrowsecurity and relforcerowsecurity) from pg_class "
            "where oid = any($1::text[]::regclass[])",
            [f"millpond.{table}" for table in TABLES],
        )
    finally:
        await con.close()
    assert len(keys) >= 10
    assert {row["attname"] for row in keys} == {"org_id"}
    assert forced


async def test_text_search_role_reads_chunks_only_and_cannot_log_in(admin_url: str) -> None:
    con = await asyncpg.connect(admin_url)
    try:
        role = await con.fetchrow(
            "select rolcanlogin, rolsuper, rolbypassrls, rolcreaterole from pg_roles "
            "where rolname = 'millpond_search'"
        )
        assert role is not None
        assert not any(role.values())
        function = await con.fetchrow(
            "select prosecdef, proconfig, proowner::regrole::text as owner, proacl::text "
            "from pg_proc where proname = 'search_text'"
        )
        assert function is not None
        assert function["prosecdef"]
        assert function["owner"] == "millpond_search"
        assert function["proconfig"] == ["search_path=pg_catalog, millpond, pg_temp"]
        assert "{=X" not in function["proacl"]
        assert ",=X" not in function["proacl"]
        await con.execute("set role millpond_search")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await con.fetch("select text from millpond.chunk")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await con.execute("delete from millpond.chunk")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await con.execute("create table millpond.mine (a int)")
    finally:
        await con.close()


async def test_text_search_uses_its_index_under_row_level_security(
    db: Database, urls: Urls, admin_url: str, org: int, store: KnowledgeStore, upload: Upload
) -> None:
    """The plan of the function's own statements, read by auto_explain as they run."""
    document_id = await upload("a.md", "A canoe floats.")
    base = (await store.bases(org))[0]
    async with db.org(org) as con:
        await con.execute(
            """
            insert into chunk (org_id, base_id, document_id, version, ordinal, start_char, end_char,
                               text, tsv)
            select $1, $2, $3, 1, n, 0, length(t), t, to_tsvector('english', t)
            from (select n, 'lexeme' || n || ' and words' as t from generate_series(1, 20000) n) s
            """,
            org,
            base.id,
            document_id,
        )
        await con.execute(
            "update document set ready_version = 1, status = 'ready' where document_id = $1",
            document_id,
        )
    con = await asyncpg.connect(admin_url)
    plans: list[str] = []
    try:
        await con.execute("analyze millpond.chunk")
        con.add_log_listener(lambda _, message: plans.append(str(message)))
        await con.execute(
            "load 'auto_explain'; set auto_explain.log_min_duration = 0; "
            "set auto_explain.log_nested_statements = on; set client_min_messages = log; "
            "set session authorization millpond_app; set search_path = millpond, public"
        )
        await con.execute(f"set millpond.org = '{org}'")
        rows = await con.fetch(
            "select * from search_text($1, 'where is lexeme777 or lexeme4242', 10)", base.id
        )
    finally:
        await con.close()
    assert {row["ordinal"] for row in rows} == {777, 4242}
    plan = "\n".join(plans)
    assert "chunk_by_lexeme" in plan
