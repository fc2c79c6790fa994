"""Schedules on real Postgres: what is due gets its runs, once, whoever looks and whatever is missed.

No test waits for a time of the calendar: it moves the next due time into the past.
"""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from pydantic import BaseModel
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.db.queries import queries
from millpond.engine import firing, schedules
from millpond.engine.context import Context
from millpond.engine.firing import run_id_of
from millpond.engine.schedules import Draft, Schedule
from millpond.errors import Conflict, Unavailable


class Report(BaseModel):
    day: str = "today"


async def report(ctx: Any, wish: Report) -> str:
    return wish.day


async def long(ctx: Any, wish: Report) -> str:
    await ctx.sleep(3600.0, name="long")
    return wish.day


@pytest.fixture
def reporting(pond: Pond) -> Pond:
    pond.flow(report)
    pond.flow(long)
    return pond


async def make(pond: Pond, **wish: Any) -> Schedule:
    given = {"name": "nightly", "flow": "report", "cron": "* * * * *", "input": {"day": "mon"}}
    async with pond.db.org(pond.org_id) as con:
        return await schedules.create(con, pond.org_id, Draft(**{**given, **wish}), "user:ann")


async def read(pond: Pond, schedule: Schedule) -> Schedule:
    async with pond.db.org(pond.org_id) as con:
        return await schedules.get(con, pond.org_id, schedule.schedule_id)


async def publish(pond: Pond, name: str = "report", schema: Any = None) -> None:
    """Publish a flow and a live worker that has it, which runs nothing."""
    async with pond.engine_db.duty("publish") as con:
        schema_text = orjson.dumps(schema or {}).decode()
        await con.execute(
            queries("maintenance")["publish_flow"],
            name, 1, "default", "runs:start", "", schema_text, None, None, None, "{}", [], "standard",
        )  # fmt: skip
        await con.execute(
            queries("maintenance")["register_worker"],
            uuid.uuid4(), "here", 1, "{}", [f"{name}@1"], 600.0, "", "{}",
        )  # fmt: skip


async def back(pond: Pond, schedule: Schedule, **ago: float) -> datetime:
    """Make a schedule due a while ago, at a whole minute; returns when."""
    async with pond.engine_db.duty("test") as con:
        due: datetime = await con.fetchval(
            """update schedule set next_due_at = date_trunc('minute', clock_timestamp() - $2::interval)
               where schedule_id = $1 returning next_due_at""",
            schedule.schedule_id,
            timedelta(**ago),
        )
    return due


async def since_years(pond: Pond, schedule: Schedule, years: int) -> int:
    """Make a yearly schedule due since the first of January so many years ago; returns this year."""
    this_year = datetime.now(UTC).year
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update schedule set next_due_at = $2 where schedule_id = $1",
            schedule.schedule_id,
            new_year(this_year - years),
        )
    return this_year


def new_year(year: int) -> datetime:
    return datetime(year, 1, 1, tzinfo=UTC)


async def follow(pond: Pond, schedule: Schedule, run_id: uuid.UUID) -> None:
    """Make a run the last one of a schedule."""
    async with pond.db.org(pond.org_id) as con:
        await schedules.note_started(con, pond.org_id, schedule.schedule_id, run_id)


async def runs(pond: Pond) -> list[Any]:
    async with pond.db.org(pond.org_id) as con:
        return await con.fetch("select * from run order by run_id")


async def until_fired(pond: Pond, schedule: Schedule) -> Schedule:
    async with asyncio.timeout(DEADLINE_S):
        while (found := await read(pond, schedule)).last_run_id is None:
            await asyncio.sleep(0.02)
    return found


async def test_a_flows_own_deadline_holds_for_runs_of_a_schedule(pond: Pond) -> None:
    async def report(ctx: Context, _: Any) -> None:
        return None

    pond.flow(report, deadline_s=600.0)
    schedule = await make(pond)
    async with pond.worker():
        await back(pond, schedule, seconds=30)
        fired = await until_fired(pond, schedule)
        assert fired.last_run_id is not None
        run = await pond.ended(fired.last_run_id)
    assert (run["deadline_at"] - run["created_at"]).total_seconds() == 600.0


async def test_a_due_schedule_starts_its_flow_as_itself(reporting: Pond) -> None:
    schedule = await make(reporting, labels={"team": "ops"}, priority=7)
    async with reporting.worker():
        due = await back(reporting, schedule, seconds=30)
        fired = await until_fired(reporting, schedule)
        assert fired.last_run_id is not None
        run = await reporting.ended(fired.last_run_id)
    assert (run["outcome"], run["output"]) == ("succeeded", "mon")
    assert (run["subject"], run["priority"]) == ("service:schedule:nightly", 7)
    labels = orjson.loads(run["labels"])
    assert labels["millpond.scheduled_at"].startswith("20")
    assert (labels["team"], labels["millpond.schedule"]) == ("ops", "nightly")
    assert fired.next_due_at is not None
    assert fired.next_due_at > datetime.now(UTC) - timedelta(seconds=5)
    assert fired.last_due_at is not None
    assert fired.last_due_at >= due


async def test_schedules_of_several_orgs_are_started_for_their_own(
    reporting: Pond, other_org: int
) -> None:
    await publish(reporting)
    first = await make(reporting)
    async with reporting.db.org(other_org) as con:
        draft = Draft(name="nightly", flow="report", cron="* * * * *")
        other = await schedules.create(con, other_org, draft, "user:bob")
    for one in (first, other):
        await back(reporting, one, seconds=0)
    readied = await firing.fire(reporting.engine_db)
    assert {one.org_id for one in readied} == {reporting.org_id, other_org}
    assert len(await runs(reporting)) == 1


async def test_many_workers_at_once_start_each_due_time_once(reporting: Pond) -> None:
    await publish(reporting)
    made = [await make(reporting, name=f"s{n}", missed="one") for n in range(20)]
    for one in made:
        await back(reporting, one, seconds=0)
    fired = await asyncio.gather(*(firing.fire(reporting.engine_db) for _ in range(6)))
    assert sum(map(len, fired)) == 20
    assert len(await runs(reporting)) == 20


async def test_a_crash_before_the_commit_leaves_nothing_and_a_repeat_starts_once(
    reporting: Pond,
) -> None:
    await publish(reporting)
    schedule = await make(reporting, cron="@yearly")
    due = new_year(await since_years(reporting, schedule, 0))
    with pytest.raises(Unavailable):
        async with reporting.engine_db.duty("schedule") as con:
            await firing._fire(con, 10, None)
            raise Unavailable("the worker was killed here")
    assert await runs(reporting) == []
    assert len(await firing.fire(reporting.engine_db)) == 1
    # Also a schedule that was moved back by hand does not start the same time again.
    await since_years(reporting, schedule, 1)
    assert await firing.fire(reporting.engine_db) == []
    (run,) = await runs(reporting)
    assert run["run_id"] == run_id_of(schedule.schedule_id, due)
    assert (await read(reporting, schedule)).last_run_id == run["run_id"]


@pytest.mark.parametrize(
    ("missed", "expected"),
    [("skip", []), ("one", [0]), ("all", [-3, -2, -1, 0])],
)
async def test_missed_times_are_dropped_made_up_for_once_or_each(
    reporting: Pond, missed: str, expected: list[int]
) -> None:
    await publish(reporting)
    schedule = await make(reporting, cron="@yearly", missed=missed)
    year = await since_years(reporting, schedule, 3)
    await firing.fire(reporting.engine_db)
    labels = [orjson.loads(row["labels"])["millpond.scheduled_at"] for row in await runs(reporting)]
    wanted = [new_year(year + n) for n in expected]
    assert labels == [at.strftime("%Y-%m-%dT%H:%M:%SZ") for at in wanted]
    found = await read(reporting, schedule)
    assert found.next_due_at == new_year(year + 1)
    assert found.last_error is None


async def test_of_more_than_a_hundred_missed_times_the_newest_hundred_get_runs(
    reporting: Pond,
) -> None:
    await publish(reporting)
    schedule = await make(reporting, missed="all")
    await back(reporting, schedule, days=3)
    await firing.fire(reporting.engine_db)
    found = await runs(reporting)
    assert len({row["run_id"] for row in found}) == 100
    times = [orjson.loads(row["labels"])["millpond.scheduled_at"] for row in found]
    assert times == sorted(times)
    newest = datetime.fromisoformat(times[-1])
    assert datetime.now(UTC) - newest < timedelta(minutes=2)


async def test_overlap_skip_starts_nothing_while_the_last_run_lives(reporting: Pond) -> None:
    await publish(reporting)
    schedule = await make(reporting, cron="@yearly", overlap="skip", missed="all")
    live = await reporting.submit("report", {})
    await follow(reporting, schedule, live)
    await since_years(reporting, schedule, 3)
    assert await firing.fire(reporting.engine_db) == []
    found = await read(reporting, schedule)
    assert (found.last_run_id, found.last_error) == (live, None)
    assert found.next_due_at is not None
    assert found.next_due_at > datetime.now(UTC)
    async with reporting.engine_db.duty("test") as con:
        await con.execute("delete from item where item_id = $1", live)
    # Of several times at once the first starts; the others find it live.
    year = await since_years(reporting, schedule, 3)
    (readied,) = await firing.fire(reporting.engine_db)
    assert readied.run_id == run_id_of(schedule.schedule_id, new_year(year - 3))


async def test_overlap_cancel_old_asks_to_cancel_the_last_run_in_the_same_commit(
    reporting: Pond,
) -> None:
    await publish(reporting)
    schedule = await make(reporting, cron="@yearly", overlap="cancel_old", missed="all")
    live = await reporting.submit("report", {})
    await follow(reporting, schedule, live)
    year = await since_years(reporting, schedule, 3)
    (readied,) = await firing.fire(reporting.engine_db)
    # Of several times at once the last starts: it would cancel the others.
    assert readied.run_id == run_id_of(schedule.schedule_id, new_year(year))
    asked = (reporting.org_id, "cancel", live, "service:schedule:nightly")
    assert await cancels(reporting) == [asked]
    # A repeat finds its own run as the last one, and does not cancel it.
    await since_years(reporting, schedule, 1)
    assert await firing.fire(reporting.engine_db) == []
    assert await cancels(reporting) == [asked]


@pytest.mark.parametrize("overlap", ["skip", "cancel_old"])
async def test_overlap_follows_the_last_run_to_the_one_it_continues_as(
    pond: Pond, overlap: str
) -> None:
    async def goes_on(ctx: Context, given: dict[str, int]) -> None:
        if given.get("number", 0) < 2:
            await ctx.continue_as({"number": given.get("number", 0) + 1})
        await ctx.sleep(3600.0)

    pond.flow(goes_on)
    schedule = await make(
        pond, flow="goes_on", input={"number": 2}, cron="@yearly", overlap=overlap, missed="all"
    )
    async with pond.worker():
        first_id = await pond.submit("goes_on", {})
        second_id = (await pond.ended(first_id))["continued_to"]
        last_id = (await pond.ended(second_id))["continued_to"]
        await pond.until(last_id, "run.waiting")
        await follow(pond, schedule, first_id)
        await since_years(pond, schedule, 0)
        async with asyncio.timeout(DEADLINE_S):
            while (found := await read(pond, schedule)).last_run_id == first_id:
                await asyncio.sleep(0.02)
        if overlap == "skip":
            assert found.last_run_id == last_id
            assert len(await runs(pond)) == 3
        else:
            assert (await pond.ended(last_id))["outcome"] == "cancelled"


async def cancels(pond: Pond) -> list[tuple[Any, ...]]:
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch("select org_id, kind, run_id, asked_by from chore")
    return [tuple(row) for row in rows]


async def test_a_paused_schedule_starts_nothing_and_makes_up_for_nothing(reporting: Pond) -> None:
    await publish(reporting)
    schedule = await make(reporting, missed="all")
    await back(reporting, schedule, hours=1)
    async with reporting.db.org(reporting.org_id) as con:
        paused = await schedules.set_paused(
            con, reporting.org_id, schedule.schedule_id, "user:bob", is_paused=True
        )
    assert paused.next_due_at is None
    assert await firing.fire(reporting.engine_db) == []
    async with reporting.db.org(reporting.org_id) as con:
        resumed = await schedules.set_paused(
            con, reporting.org_id, schedule.schedule_id, "user:bob", is_paused=False
        )
    assert resumed.next_due_at is not None
    assert resumed.next_due_at > datetime.now(UTC) - timedelta(seconds=5)
    assert await runs(reporting) == []


async def test_an_input_that_no_longer_fits_is_noted_and_the_others_go_on(reporting: Pond) -> None:
    await publish(reporting)
    await publish(reporting, "strict", {"type": "object", "required": ["amount"]})
    broken = await make(reporting, name="broken", flow="strict")
    sound = await make(reporting, name="sound")
    for one in (broken, sound):
        await back(reporting, one, seconds=0)
    (readied,) = await firing.fire(reporting.engine_db)
    found = await read(reporting, broken)
    assert found.last_error is not None
    assert found.last_error.startswith("input_mismatch")
    assert "amount" in found.last_error
    assert "mon" not in found.last_error
    assert found.next_due_at is not None
    assert found.next_due_at > datetime.now(UTC) - timedelta(seconds=5)
    assert (await read(reporting, sound)).last_run_id == readied.run_id


async def test_a_flow_that_nobody_has_is_noted_after_a_minute_and_made_up_for(
    reporting: Pond,
) -> None:
    skipping = await make(reporting, name="skipping", flow="gone", cron="@yearly", missed="skip")
    patient = await make(reporting, name="patient", flow="gone", cron="@yearly", missed="one")
    # While workers are replaced nobody has it for a moment: that is nothing to tell of.
    async with reporting.engine_db.duty("test") as con:
        await con.execute("update schedule set next_due_at = clock_timestamp() - interval '9 s'")
    assert await firing.fire(reporting.engine_db) == []
    assert (await read(reporting, patient)).last_error is None
    for one in (skipping, patient):
        await since_years(reporting, one, 2)
    assert await firing.fire(reporting.engine_db) == []
    for one in (skipping, patient):
        assert "flow_not_served" in ((await read(reporting, one)).last_error or "")
    await publish(reporting, "gone")
    (readied,) = await firing.fire(reporting.engine_db)
    found = await read(reporting, patient)
    assert (found.last_run_id, found.last_error) == (readied.run_id, None)
    assert (await read(reporting, skipping)).last_run_id is None


async def test_a_schedule_that_breaks_its_batch_is_stopped_alone(reporting: Pond) -> None:
    await publish(reporting)
    broken = await make(reporting, name="broken", input={"day": "x" * (17 * 2**20)})
    sound = await make(reporting, name="sound")
    for one in (broken, sound):
        await back(reporting, one, seconds=0)
    (readied,) = await firing.fire(reporting.engine_db)
    assert (await read(reporting, sound)).last_run_id == readied.run_id
    stopped = await read(reporting, broken)
    assert stopped.next_due_at is None
    assert "too_large" in (stopped.last_error or "")


async def test_a_change_made_meanwhile_is_not_overwritten(reporting: Pond) -> None:
    schedule = await make(reporting)
    org_id = reporting.org_id
    async with reporting.db.org(org_id) as con:
        await schedules.change(
            con, org_id, schedule, Draft(name="a", flow="report", cron="@daily"), "user:bob"
        )
    with pytest.raises(Conflict) as caught:
        async with reporting.db.org(org_id) as con:
            draft = Draft(name="b", flow="report", cron="@hourly")
            await schedules.change(con, org_id, schedule, draft, "user:bob")
    assert caught.value.code == "changed_meanwhile"


async def test_a_changed_expression_counts_from_now(reporting: Pond) -> None:
    schedule = await make(reporting, cron="0 0 1 1 *")
    async with reporting.db.org(reporting.org_id) as con:
        draft = Draft(name="nightly", flow="report", cron="* * * * *")
        changed = await schedules.change(con, reporting.org_id, schedule, draft, "user:bob")
    assert changed.next_due_at is not None
    assert changed.next_due_at - datetime.now(UTC) < timedelta(minutes=2)


async def test_looking_for_due_schedules_goes_by_index(reporting: Pond, admin_url: str) -> None:
    import asyncpg

    admin = await asyncpg.connect(admin_url)
    await admin.execute("set search_path = millpond, public")
    await admin.execute(
        """insert into schedule (org_id, schedule_id, name, flow, cron, next_due_at, created_by)
           select n % 7, gen_random_uuid(), 's' || n, 'report', '@daily',
                  clock_timestamp() + interval '1 day', 'user:x'
           from generate_series(1, 20000) n"""
    )
    await admin.execute("analyze schedule")
    await admin.close()
    async with reporting.engine_db.duty("explain") as con:
        statement = queries("schedules")["take_due"]
        plan = await con.fetch(f"explain {statement}", 100, None, 60.0)
    text = "\n".join(row[0] for row in plan)
    assert "schedule_due" in text
    assert "Seq Scan on schedule" not in text


async def test_a_due_schedule_is_started_within_a_second_or_so(reporting: Pond) -> None:
    async with reporting.worker():
        await until_served(reporting)
        schedule = await make(reporting)
        await back(reporting, schedule, seconds=0)
        async with reporting.engine_db.duty("test") as con:
            moved_at = await con.fetchval("select clock_timestamp()")
        fired = await until_fired(reporting, schedule)
        assert fired.last_run_id is not None
        run = await reporting.run_row(fired.last_run_id)
    # The chores look four times a second; a busy machine takes longer.
    assert run["created_at"] - moved_at < timedelta(seconds=5)


async def until_served(pond: Pond) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await pond.count("worker"):
            await asyncio.sleep(0.02)
