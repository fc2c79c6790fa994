"""Quotas: what is accepted never passes the maximum, whoever holds blocks, dies or gives back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import orjson
import pytest
import pytest_asyncio

from millpond.db.embedded import Urls
from millpond.db.pool import Database, EngineDatabase
from millpond.engine import firing, quotas, reserving
from millpond.engine.quota_plans import Plans
from millpond.engine.quotas import QuotaBusy, Ticket
from millpond.engine.reserving import Reserver
from millpond.engine.submit import submit
from millpond.errors import BlockGone, MillpondError, OverQuota, Permanent
from millpond.types import Intent

from .conftest import Pond
from .test_schedules import back, make, publish, read, reporting

__all__ = ["reporting"]


@pytest_asyncio.fixture
async def admin(admin_url: str) -> AsyncIterator[asyncpg.Connection]:
    con = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond, public"})
    yield con
    await con.close()


def _intent(org: int) -> Intent:
    return Intent(
        org_id=org, flow="f", version=1, queue="default", input=b"null", subject="user:ann"
    )


async def _limit(admin: asyncpg.Connection, org: int, **limits: int) -> None:
    await admin.execute(
        "update org set overrides = $2, plan_changed_at = clock_timestamp() where org_id = $1",
        org,
        orjson.dumps(limits).decode(),
    )


async def _runs(admin: asyncpg.Connection, org: int) -> int:
    count: int = await admin.fetchval("select count(*) from run where org_id = $1", org)
    return count


async def _used(db: Database, org: int, quota: str = "runs_per_month") -> int:
    async with db.org(org) as con:
        found = await quotas.read_used(con, org, await quotas.limits_of(con, org))
    return next(one.used for one in found if one.quota == quota)


async def _until(admin: asyncpg.Connection, org: int, taken: int) -> None:
    """Wait until so much of the quota is taken in all."""
    async with asyncio.timeout(20):
        while await _runs(admin, org) < taken:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def _process(urls: Urls) -> AsyncIterator[tuple[Database, Reserver]]:
    """What one API process holds; ends without giving anything back."""
    db = await Database.connect(urls.app, max_size=6)
    try:
        yield db, Reserver(db, Plans())
    finally:
        await db.close()


async def _accept(db: Database, reserver: Reserver, org: int, amount: int = 1) -> None:
    async def work(ticket: Ticket) -> None:
        async with db.org(org) as con:
            await submit(con, [_intent(org) for _ in range(amount)], ticket)

    await reserver.spending(org, amount, work)


async def _accept_until_refused(
    db: Database, reserver: Reserver, org: int
) -> tuple[int, OverQuota]:
    accepted = 0
    while True:
        try:
            await _accept(db, reserver, org)
        except OverQuota as error:
            return accepted, error
        accepted += 1


@pytest.mark.parametrize("maximum", [1, 37, 400])
async def test_processes_together_accept_exactly_the_quota(
    urls: Urls, org: int, admin: asyncpg.Connection, maximum: int
) -> None:
    await _limit(admin, org, runs_per_month=maximum, runs_per_day=maximum + 5)
    async with _process(urls) as one, _process(urls) as two, _process(urls) as three:
        ended = await asyncio.gather(
            *(
                _accept_until_refused(*process, org)
                for process in (one, two, three)
                for _ in range(3)
            )
        )
        assert sum(accepted for accepted, _ in ended) == maximum
        assert await _runs(admin, org) == maximum
        assert await _used(one[0], org) == maximum
        for _, error in ended:
            assert error.details["quota"] == "runs_per_month"
            assert (error.details["used"], error.details["maximum"]) == (maximum, maximum)


async def test_what_a_killed_process_held_is_spent_by_others(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    await _limit(admin, org, runs_per_month=100)
    async with _process(urls) as (db, reserver):
        for _ in range(3):
            await _accept(db, reserver, org)
    assert await admin.fetchval("select sum(size) from quota_block where org_id = $1", org) > 3
    async with _process(urls) as (db, reserver):
        accepted, _ = await _accept_until_refused(db, reserver, org)
        assert accepted == 97
    assert await _runs(admin, org) == 100


async def test_a_block_that_was_taken_back_pays_for_nothing(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    """A process that was stopped for long and goes on finds its block gone, and stores nothing by it."""
    await _limit(admin, org, runs_per_month=20)
    async with _process(urls) as (db, slow), _process(urls) as (other, quick):
        ticket = await slow.take(org, 1)
        accepted, _ = await _accept_until_refused(other, quick, org)
        assert accepted == 20
        with pytest.raises(BlockGone):
            async with db.org(org) as con:
                await submit(con, [_intent(org)], ticket)
        with pytest.raises(OverQuota):
            await _accept(db, slow, org)
    assert await _runs(admin, org) == 20


async def test_a_transaction_under_way_is_counted_before_its_block_is_taken_back(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    """What it spends is not known before it commits: till then nobody is refused for good."""
    await _limit(admin, org, runs_per_month=4)
    async with _process(urls) as (db, slow), _process(urls) as (other, quick):
        ticket = await slow.take(org, 1)
        async with db.org(org) as con:
            await submit(con, [_intent(org)], ticket)
            for _ in range(3):
                await _accept(other, quick, org)
            with pytest.raises(QuotaBusy):
                await _accept(other, quick, org)
        accepted, error = await _accept_until_refused(other, quick, org)
        assert (accepted, error.details["used"]) == (0, 4)
    assert await _runs(admin, org) == 4


async def test_what_a_transaction_under_way_leaves_is_accepted_by_others(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    await _limit(admin, org, runs_per_month=100)
    async with _process(urls) as (db, slow), _process(urls) as (other, quick):
        for _ in range(80):
            await _accept(other, quick, org)
        await quick.close()
        ticket = await slow.take(org, 15)
        async with db.org(org) as con:
            await submit(con, [_intent(org)], ticket)
            under_way = asyncio.create_task(_accept_until_refused(other, quick, org))
            await _until(admin, org, 85)
        accepted, _ = await under_way
        assert accepted == 19
    assert await _runs(admin, org) == 100


async def test_the_engine_asks_to_come_again_while_others_spend(
    urls: Urls, org: int, admin: asyncpg.Connection, engine_db: EngineDatabase
) -> None:
    await _limit(admin, org, runs_per_month=10)
    async with _process(urls) as (db, reserver):
        ticket = await reserver.take(org, 5)
        async with db.org(org) as con:
            await submit(con, [_intent(org)], ticket)
            with pytest.raises(QuotaBusy):
                async with engine_db.duty("schedule") as duty:
                    await quotas.take_now(duty, org, 7)
        async with engine_db.duty("schedule") as duty:
            assert await quotas.take_now(duty, org, 7) == 7


async def test_a_schedule_stays_due_while_others_spend_the_last(
    reporting: Pond, admin: asyncpg.Connection
) -> None:
    pond = reporting
    await publish(pond)
    schedule = await make(pond, name="one", missed="one")
    await _limit(admin, pond.org_id, runs_per_month=1)
    await admin.execute("update schedule set next_due_at = date_trunc('minute', clock_timestamp())")
    reserver = Reserver(pond.db, Plans())
    ticket = await reserver.take(pond.org_id, 1)
    with pytest.raises(Permanent):
        async with pond.db.org(pond.org_id) as con:
            await submit(con, [_intent(pond.org_id)], ticket)
            assert await firing.fire(pond.engine_db) == []
            raise Permanent("something else was wrong")
    assert len(await firing.fire(pond.engine_db)) == 1
    assert (await read(pond, schedule)).last_error is None


async def test_blocks_that_others_ended_are_forgotten(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    await _limit(admin, org, runs_per_month=20)
    async with _process(urls) as (db, slow), _process(urls) as (other, quick):
        await _accept(db, slow, org)
        await _accept_until_refused(other, quick, org)
        (held,) = slow._held.values()
        with pytest.raises(OverQuota):
            await _accept(db, slow, org)
        await slow.close()
        assert not any(held.retired.values())


async def test_a_lowered_plan_stops_a_busy_org(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    """Blocks that were taken by the old plan pay for nothing once the process has heard of the new one."""
    await _limit(admin, org, runs_per_month=1000)
    async with _process(urls) as (db, reserver):
        for _ in range(3):
            await _accept(db, reserver, org)
        await _limit(admin, org, runs_per_month=3)
        await reserver.refresh()
        accepted, error = await _accept_until_refused(db, reserver, org)
    assert (accepted, error.details["used"]) == (0, 3)


async def test_all_blocks_are_given_back_when_whoever_spends_of_them_has_committed(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    await _limit(admin, org, runs_per_month=100)

    async def give_back() -> None:
        async with other.org(org) as con:
            await quotas.give_back_all(con, org)

    async with _process(urls) as (db, reserver), _process(urls) as (other, _):
        ticket = await reserver.take(org, 1)
        async with db.org(org) as con:
            await submit(con, [_intent(org)], ticket)
            giving = asyncio.create_task(give_back())
            async with asyncio.timeout(10):
                while not await admin.fetchval("select count(*) from pg_locks where not granted"):
                    await asyncio.sleep(0.01)
        await giving
        with pytest.raises(BlockGone):
            async with db.org(org) as con:
                await submit(con, [_intent(org)], ticket)
    assert await admin.fetchval("select taken from quota_count where org_id = $1", org) == 1


async def test_plans_are_heard_of_after_an_error_of_any_kind(
    urls: Urls, org: int, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    async def fail() -> None:
        nonlocal failures
        failures += 1
        raise RuntimeError("something that nobody thought of")

    monkeypatch.setattr(reserving, "REFRESH_S", 0.01)
    async with _process(urls) as (_, reserver), asyncio.timeout(20):
        await reserver.refresh()
        await _limit(admin, org, runs_per_month=1)
        async with reserving.keeping(reserver):
            with monkeypatch.context() as patch:
                patch.setattr(reserver, "refresh", fail)
                while failures < 2:
                    await asyncio.sleep(0.01)
            while not await reserver.limits_if_any(org):
                await asyncio.sleep(0.01)


async def test_an_org_without_limits_does_not_wait_for_the_database(
    urls: Urls, org: int, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _process(urls) as (_, reserver):
        await reserver.refresh()
        monkeypatch.setattr(reserving, "_STALE_S", 0.0)
        async with admin.transaction(), asyncio.timeout(5):
            await admin.execute("lock table plan")
            assert await reserver.limits_if_any(org) == {}


async def test_what_is_not_spent_is_given_back(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    await _limit(admin, org, runs_per_month=1000)
    async with _process(urls) as (db, reserver):
        for _ in range(3):
            await _accept(db, reserver, org)
        await reserver.close()
    assert await admin.fetchval("select taken from quota_count where org_id = $1", org) == 3
    assert await admin.fetchval("select count(*) from quota_block") == 0
    assert await admin.fetchval("select count(*) from quota_spend") == 0


async def test_a_transaction_that_fails_costs_nothing(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    await _limit(admin, org, runs_per_month=2)
    async with _process(urls) as (db, reserver):

        async def work(ticket: Ticket) -> None:
            async with db.org(org) as con:
                await submit(con, [_intent(org)], ticket)
                raise Permanent("something else was wrong")

        for _ in range(5):
            with pytest.raises(Permanent):
                await reserver.spending(org, 1, work)
        accepted, _ = await _accept_until_refused(db, reserver, org)
    assert accepted == 2


async def test_many_at_once_are_accepted_whole_or_not_at_all(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    await _limit(admin, org, runs_per_month=10)
    async with _process(urls) as (db, reserver), _process(urls) as (other, holder):
        await _accept(other, holder, org)
        with pytest.raises(OverQuota) as caught:
            await _accept(db, reserver, org, 10)
        assert caught.value.details["used"] == 1
        await _accept(db, reserver, org, 9)
    assert await _runs(admin, org) == 10


async def test_a_new_period_has_its_quota_whole(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    """By the database's clock: the count and the block of yesterday pay for nothing today."""
    await _limit(admin, org, runs_per_day=3)
    async with _process(urls) as (db, reserver):
        ticket = await reserver.take(org, 1)
        await admin.execute(
            "update quota_count set starts_at = starts_at - interval '1 day', ends_at = ends_at - interval '1 day'"
        )
        await admin.execute(
            "update quota_block set starts_at = starts_at - interval '1 day', ends_at = ends_at - interval '1 day'"
        )
        with pytest.raises(BlockGone):
            async with db.org(org) as con:
                await submit(con, [_intent(org)], ticket)
        accepted, error = await _accept_until_refused(db, reserver, org)
    assert accepted == 3
    assert error.details["quota"] == "runs_per_day"


async def test_runs_before_the_quota_was_set_count(
    urls: Urls, org: int, admin: asyncpg.Connection
) -> None:
    async with _process(urls) as (db, reserver):
        for _ in range(4):
            await _accept(db, reserver, org)
        await _limit(admin, org, runs_per_month=6)
        await reserver.refresh()
        accepted, _ = await _accept_until_refused(db, reserver, org)
    assert accepted == 2


async def test_the_engine_spends_at_once_and_no_more_than_there_is(
    urls: Urls, org: int, admin: asyncpg.Connection, engine_db: EngineDatabase
) -> None:
    await _limit(admin, org, runs_per_month=10)
    async with _process(urls) as (db, reserver):
        await _accept(db, reserver, org)
        async with engine_db.duty("schedule") as con:
            assert await quotas.take_now(con, org, 7) == 7
        async with engine_db.duty("schedule") as con:
            assert await quotas.take_now(con, org, 7) == 2
        with pytest.raises(OverQuota):
            await _accept(db, reserver, org)


async def test_another_org_is_not_concerned(
    urls: Urls, org: int, other_org: int, admin: asyncpg.Connection
) -> None:
    await _limit(admin, org, runs_per_month=1)
    async with _process(urls) as (db, reserver):
        await _accept_until_refused(db, reserver, org)
        for _ in range(20):
            await _accept(db, reserver, other_org)
    assert (
        await admin.fetchval("select count(*) from quota_count where org_id = $1", other_org) == 0
    )


async def test_a_due_schedule_that_is_not_paid_for_says_so_and_goes_on(
    reporting: Pond, admin: asyncpg.Connection
) -> None:
    pond = reporting
    await publish(pond)
    made = [await make(pond, name=name, missed="one") for name in ("one", "two", "three")]
    await _limit(admin, pond.org_id, runs_per_month=2)
    for schedule in made:
        await back(pond, schedule, seconds=30)
    started = await firing.fire(pond.engine_db)
    assert len(started) == 2
    assert await _runs(admin, pond.org_id) == 2
    after = [await read(pond, schedule) for schedule in made]
    assert [one.last_error for one in after].count(quotas.USED_UP) == 1
    assert all(one.next_due_at is not None for one in after)
    with pytest.raises(OverQuota):
        async with pond.db.org(pond.org_id) as con:
            await quotas.spend_one(con, pond.org_id)


@pytest.mark.parametrize(
    "write",
    [
        "update plan set limits = '{}'",
        "insert into model_price values ('m', 1, 1)",
        "insert into rate_bucket (bucket, tokens) values ('org:1', 9)",
    ],
)
async def test_nothing_of_the_platform_is_changed_in_a_transaction_of_an_org(
    urls: Urls, org: int, write: str
) -> None:
    async with _process(urls) as (db, _):
        async with db.globals() as con:
            assert await con.execute(write) != "UPDATE 0"
            await con.execute("delete from model_price")
            await con.execute("delete from rate_bucket")
        if write.startswith("update"):
            async with db.org(org) as con:
                assert await con.execute(write) == "UPDATE 0"
            return
        with pytest.raises(MillpondError):
            async with db.org(org) as con:
                await con.execute(write)
