"""Transactions end clean, whatever happens inside them, and errors come as Millpond's."""

from __future__ import annotations

import asyncio
import json

import asyncpg
import pytest

from millpond.db.embedded import EmbeddedPostgres, Urls
from millpond.db.migrate import migrate
from millpond.db.pool import Database, EngineDatabase
from millpond.errors import Conflict, InvalidInput, Permanent, Transient, Unavailable

NEW_ORG = "insert into org (slug, name) values ($1, $1)"
OWN_PID = "select pg_backend_pid()"
ORG_SETTING = "select current_setting('millpond.org', true)"


async def test_a_transaction_commits_at_its_end(db: Database) -> None:
    async with db.globals() as con:
        await con.execute(NEW_ORG, "kept")
    async with db.globals() as con:
        assert await con.fetchval("select name from org where slug = 'kept'") == "kept"


async def test_an_error_of_the_block_rolls_back_and_passes(urls: Urls) -> None:
    db = await Database.connect(urls.app, max_size=1)
    with pytest.raises(LookupError):
        async with db.globals() as con:
            pid = await con.fetchval(OWN_PID)
            await con.execute(NEW_ORG, "lost")
            raise LookupError
    async with db.globals() as con:
        assert await con.fetchval(OWN_PID) == pid, "a rolled back connection is kept"
        assert await con.fetchval("select count(*) from org where slug = 'lost'") == 0
    await db.close()


async def test_a_swallowed_statement_error_never_looks_like_a_commit(db: Database) -> None:
    with pytest.raises(Permanent) as caught:
        async with db.globals() as con:
            await con.execute(NEW_ORG, "twice")
            with pytest.raises(asyncpg.UniqueViolationError):
                await con.execute(NEW_ORG, "twice")
    assert caught.value.code == "transaction_aborted"
    async with db.globals() as con:
        assert await con.fetchval("select count(*) from org where slug = 'twice'") == 0


async def test_the_org_ends_with_its_transaction(urls: Urls) -> None:
    db = await Database.connect(urls.app, max_size=1)
    async with db.org(7) as con:
        assert await con.fetchval(ORG_SETTING) == "7"
    async with db.globals() as con:
        assert await con.fetchval(ORG_SETTING) == ""
    await db.close()


async def test_a_connection_cancelled_in_a_transaction_is_discarded(urls: Urls, org: int) -> None:
    db = await Database.connect(urls.app, max_size=1)
    pids: asyncio.Queue[int] = asyncio.Queue()

    async def block() -> None:
        async with db.org(org) as con:
            assert await con.execute("update org set name = 'never'") == "UPDATE 1"
            await pids.put(await con.fetchval(OWN_PID))
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    pid = await pids.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with db.globals() as con:
        assert await con.fetchval(OWN_PID) != pid
        assert await con.fetchval("select count(*) from org where name = 'never'") == 0
        assert await con.fetchval(ORG_SETTING) == ""
    await db.close()


async def test_a_cancelled_statement_ends_on_the_server(urls: Urls, admin_url: str) -> None:
    """Cutting the connection would leave it running there, with its locks."""
    db = await Database.connect(urls.app, max_size=1)
    sleeping = "select count(*) from pg_stat_activity where query = 'select pg_sleep(600)'"
    admin = await asyncpg.connect(admin_url)

    async def block() -> None:
        async with db.globals() as con:
            await con.execute("select pg_sleep(600)")

    task = asyncio.create_task(block())
    async with asyncio.timeout(20):
        while not await admin.fetchval(sleeping):
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        while await admin.fetchval(sleeping):
            await asyncio.sleep(0.01)
    async with db.globals() as con:
        assert await con.fetchval("select 1") == 1
    await admin.close()
    await db.close()


async def test_a_connection_lost_in_a_transaction_is_unavailable_and_replaced(
    urls: Urls, admin_url: str
) -> None:
    db = await Database.connect(urls.app, max_size=1)
    admin = await asyncpg.connect(admin_url)
    with pytest.raises(Unavailable):
        async with db.globals() as con:
            pid = await con.fetchval(OWN_PID)
            await admin.execute("select pg_terminate_backend($1, 5000)", pid)
            await con.fetchval("select 1")
    async with db.globals() as con:
        assert await con.fetchval(OWN_PID) != pid
    await admin.close()
    await db.close()


async def test_a_connection_lost_while_idle_is_replaced_unnoticed(
    urls: Urls, admin_url: str
) -> None:
    db = await Database.connect(urls.app, max_size=1)
    admin = await asyncpg.connect(admin_url)
    async with db.globals() as con:
        pid = await con.fetchval(OWN_PID)
        lost = asyncio.Event()
        con.add_termination_listener(lambda _: lost.set())
    await admin.execute("select pg_terminate_backend($1, 5000)", pid)
    async with asyncio.timeout(20):
        await lost.wait()
    async with db.globals() as con:
        assert await con.fetchval(OWN_PID) != pid
    await admin.close()
    await db.close()


async def test_a_connection_goes_to_whoever_waits_for_one(urls: Urls) -> None:
    db = await Database.connect(urls.app, max_size=1)

    async def own_pid() -> int:
        async with db.globals() as con:
            return int(await con.fetchval(OWN_PID))

    async with db.globals() as con:
        pid = await con.fetchval(OWN_PID)
        waiting = [asyncio.create_task(own_pid()) for _ in range(5)]
        await con.fetchval("select 1")
    async with asyncio.timeout(5):
        assert await asyncio.gather(*waiting) == [pid] * 5
    await db.close()


async def test_claims_keep_their_connection_and_others_theirs(urls: Urls) -> None:
    """Each connection makes its plans anew, and a claim's are large."""
    engine = await EngineDatabase.connect(urls.engine, min_size=1, max_size=2)
    try:
        async with engine.duty("claim") as con:
            of_claims = await con.fetchval(OWN_PID)
        async with engine.duty("rescue") as con:
            of_others = await con.fetchval(OWN_PID)
        assert of_others != of_claims
        for name, pid in (
            ("claim", of_claims),
            ("commit", of_others),
            ("claim_at_once", of_claims),
        ):
            async with engine.duty(name) as con:
                assert await con.fetchval(OWN_PID) == pid, name
        async with engine.duty("rescue") as con, engine.duty("commit") as other:
            pids = {await con.fetchval(OWN_PID), await other.fetchval(OWN_PID)}
        assert pids == {of_claims, of_others}, "where there are no more, others have a claim's"
    finally:
        await engine.close()


async def test_a_taken_key_is_a_conflict(db: Database) -> None:
    with pytest.raises(Conflict) as caught:
        async with db.globals() as con:
            await con.execute(NEW_ORG, "taken")
            await con.execute(NEW_ORG, "taken")
    assert caught.value.details["constraint"] == "org_slug_key"


@pytest.mark.parametrize("slug", ["No Slug", "nul\x00", 5])
async def test_a_value_that_does_not_fit_is_invalid_input(db: Database, slug: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        async with db.globals() as con:
            await con.execute(NEW_ORG, slug)
    assert caught.value.code == "unstorable_value"
    assert str(slug) not in caught.value.message


async def test_what_a_role_may_not_do_is_permanent(engine_db: EngineDatabase) -> None:
    with pytest.raises(Permanent) as caught:
        async with engine_db.duty("claim") as con:
            await con.execute("select * from signing_key")
    assert caught.value.code == "database_privilege"


async def test_a_statement_timeout_is_transient(db: Database) -> None:
    with pytest.raises(Transient):
        async with db.globals() as con:
            await con.execute("set local statement_timeout = '10ms'; select pg_sleep(60)")


async def test_a_duty_may_limit_its_statements_on_the_server(engine_db: EngineDatabase) -> None:
    with pytest.raises(Transient):
        async with engine_db.duty("test", limit_s=0.05) as con:
            await con.execute("select pg_sleep(10)")
    async with engine_db.duty("test") as con:
        assert await con.fetchval("show statement_timeout") == "30s"


async def test_a_duty_that_is_idle_for_too_long_loses_its_locks(engine_db: EngineDatabase) -> None:
    lock = "select pg_advisory_xact_lock(7)"
    with pytest.raises(Transient):
        async with engine_db.duty("test", idle_s=0.1) as con:
            await con.execute(lock)
            async with asyncio.timeout(20), engine_db.duty("other") as other:
                await other.execute(lock)  # which waits until the first one is ended
            await con.execute(lock)


async def test_a_wrong_number_of_arguments_is_permanent(db: Database) -> None:
    with pytest.raises(Permanent, match="arguments"):
        async with db.globals() as con:
            await con.fetchval("select $1::int", 1, 2)


async def test_a_deadlock_is_transient(urls: Urls) -> None:
    db = await Database.connect(urls.app)
    async with db.globals() as con:
        await con.execute(NEW_ORG, "a")
        await con.execute(NEW_ORG, "b")
    met = asyncio.Barrier(2)

    async def rename(first: str, second: str) -> None:
        async with db.globals() as con:
            await con.execute("update org set name = 'x' where slug = $1", first)
            await met.wait()
            await con.execute("update org set name = 'x' where slug = $1", second)

    ends = await asyncio.gather(rename("a", "b"), rename("b", "a"), return_exceptions=True)
    assert [type(end) for end in ends if end is not None] == [Transient]
    await db.close()


async def test_a_duty_may_commit_before_it_is_on_disk(engine_db: EngineDatabase) -> None:
    setting = "select current_setting('synchronous_commit'), current_setting('millpond.duty')"
    async with engine_db.duty("claim", durable=False) as con:
        assert tuple(await con.fetchrow(setting)) == ("off", "claim")
    async with engine_db.duty("commit") as con:
        assert tuple(await con.fetchrow(setting)) == ("on", "commit")
    with pytest.raises(ValueError, match="one word"):
        async with engine_db.duty("claim'; drop table run; --"):
            pass


async def test_a_wrong_password_says_so(urls: Urls) -> None:
    with pytest.raises(Permanent) as caught:
        await Database.connect(urls.app.replace("millpond_app:", "millpond_app:wrong"))
    assert caught.value.code == "database_login"
    with pytest.raises(Permanent) as caught:
        await Database.connect(urls.app.replace("@/", "@/absent_"))
    assert caught.value.code == "database_url"


async def test_stopped_postgres_is_unavailable_and_a_pool_outlives_it(data_dir: object) -> None:
    server = EmbeddedPostgres(data_dir, options={"fsync": "off"})
    urls = await server.start()
    await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
    db = await Database.connect(urls.app)
    await db.ping()
    await server.stop()
    with pytest.raises(Unavailable):
        await db.ping()
    with pytest.raises(Unavailable) as caught:
        async with db.globals() as con:
            await con.execute("select 1")
    assert caught.value.retry_after_s
    with pytest.raises(Unavailable):
        await Database.connect(urls.app)
    await server.start()
    await db.ping()
    async with db.globals() as con:
        assert json.loads(await con.fetchval("select '[1]'::json")) == [1]
    await db.close()
    await server.stop()


async def test_a_probe_hears_of_every_commit_and_of_no_rollback(urls: Urls) -> None:
    heard: list[str] = []

    async def probe(point: str) -> None:
        heard.append(point)

    app = await Database.connect(urls.app, probe=probe)
    engine = await EngineDatabase.connect(urls.engine, probe=probe)
    async with app.org(1) as con:
        heard.append(str(await con.fetchval("select 1")))
    async with engine.statement("look") as con:
        heard.append(str(await con.fetchval("select 2")))
    with pytest.raises(Conflict):
        async with engine.duty("claim"):
            raise Conflict("the block fails")
    assert heard == ["1", "before:org", "after:org", "before:look", "2", "after:look"]
    await app.close()
    await engine.close()
