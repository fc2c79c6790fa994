"""Steps in other queues whose failure the database refuses: they fail by the refusal, or stand still."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond.engine import blocking
from millpond.engine.context import Context, StepContext
from millpond.engine.registry import Flow
from millpond.engine.why import explain
from millpond.errors import NotFound, Permanent, Transient
from millpond.retry import Retry

_REFUSE = """
set search_path = millpond;
create function refuse() returns trigger language plpgsql as $$ begin raise exception 'refused'; end $$;
create trigger refuse before update on step for each row when (new.state = 'failed' and {which})
execute function refuse()
"""
_ACCEPT = "drop trigger refuse on millpond.step; drop function millpond.refuse"


@asynccontextmanager
async def _refusing(admin_url: str, which: str) -> AsyncIterator[asyncpg.Connection]:
    """Let the database refuse some records of failed steps, on real Postgres as a constraint would."""
    admin = await asyncpg.connect(admin_url)
    await admin.execute(_REFUSE.format(which=which))
    try:
        yield admin
    finally:
        await admin.close()


def _asks(pond: Pond) -> tuple[Flow, list[int]]:
    """Register a flow whose step in another queue fails for good; returns how often that was tried too."""
    tries: list[int] = []

    async def refuse(step: StepContext) -> None:
        tries.append(step.try_number)
        raise Permanent("unwelcome words", code="denied")

    step = pond.step(refuse, queue="sql")

    async def ask(ctx: Context, _: None) -> None:
        await ctx.step(step)

    return pond.flow(ask), tries


async def test_a_failure_that_is_refused_is_stored_as_that_refusal(
    pond: Pond, admin_url: str
) -> None:
    flow, tries = _asks(pond)
    async with (
        _refusing(admin_url, "new.error::text like '%unwelcome%'"),
        pond.worker({"default": 5, "sql": 1}),
    ):
        run_id = await pond.submit(flow)
        row = await pond.ended(run_id)
    assert row["outcome"] == "failed"
    assert row["error"]["cause"] == "Permanent"
    assert "refused a statement" in row["error"]["message"]
    assert tries == [1]
    assert (await pond.kinds(run_id)).count("step.failed") == 1
    assert await pond.count("item") == await pond.count("lease") == 0


@pytest.mark.parametrize("which", ["new.error::text like '%unwelcome%'", "true"])
async def test_a_refusal_tells_of_all_tries_and_of_what_they_used(
    pond: Pond, admin_url: str, which: str
) -> None:
    """Also where not even the refusal is stored, and the step stands still."""

    async def ask(step: StepContext) -> None:
        step.spend("m", input_tokens=10**step.try_number, output_tokens=0)
        if step.try_number < 3:
            raise Transient("not yet")
        raise Permanent("unwelcome words", code="denied")

    elsewhere = pond.step(ask, queue="sql", retry=Retry(max_tries=3, base_s=0.01))

    async def asking(ctx: Context, _: None) -> None:
        await ctx.step(elsewhere)

    flow = pond.flow(asking)
    async with _refusing(admin_url, which), pond.worker({"default": 5, "sql": 1}):
        run_id = await pond.submit(flow)
        event = await pond.until(run_id, "step.blocked" if which == "true" else "step.failed")
    assert event.data["tries"] == 3
    used = "select sum(input_tokens[1]) from usage_part where models[1] = 'm'"
    async with pond.engine_db.duty("test") as con:
        folded = await con.fetchval("select sum(input_tokens) from usage_day where model = 'm'")
        assert (folded or 0) + (await con.fetchval(used) or 0) == 1110


async def test_what_the_tries_of_a_step_elsewhere_used_is_told_when_its_worker_stops(
    pond: Pond,
) -> None:
    has_spent = asyncio.Event()

    async def ask(step: StepContext) -> None:
        step.spend("m", input_tokens=10, output_tokens=0)
        has_spent.set()
        await asyncio.sleep(60)

    elsewhere = pond.step(ask, queue="sql")

    async def asking(ctx: Context, _: None) -> None:
        await ctx.step(elsewhere)

    flow = pond.flow(asking)
    async with pond.worker({"default": 5, "sql": 1}, drain_s=0.05):
        await pond.submit(flow)
        async with asyncio.timeout(DEADLINE_S):
            await has_spent.wait()
    async with pond.engine_db.duty("test") as con:
        folded = await con.fetchval("select sum(input_tokens) from usage_day where model = 'm'")
        used = "select sum(input_tokens[1]) from usage_part where models[1] = 'm'"
        assert (folded or 0) + (await con.fetchval(used) or 0) == 10


async def test_a_step_whose_every_failure_is_refused_stands_still_until_it_is_resumed(
    pond: Pond, admin_url: str
) -> None:
    flow, tries = _asks(pond)
    async with (
        _refusing(admin_url, "true") as admin,
        pond.worker({"default": 5, "sql": 1}),
    ):
        run_id = await pond.submit(flow)
        event = await pond.until(run_id, "step.blocked")
        assert event.step_key == "refuse:0"
        assert event.data["queue"] == "sql"
        assert "refused a statement" in event.data["message"]
        await _until_no_lease(pond)
        async with pond.db.org(pond.org_id) as con:
            [reason] = (await explain(con, pond.org_id, run_id)).reasons
        assert [one.kind for one in reason.inner] == ["blocked"]
        # Without a lease there is nothing that the worker could hand back for another attempt.
        assert await pond.count("item", "kind = 'step' and state = 'waiting'") == 1
        assert tries == [1]
        await admin.execute(_ACCEPT)
        await _resume(pond, run_id)
        row = await pond.ended(run_id)
    assert row["error"]["code"] == "denied"
    assert tries == [1, 1]
    with pytest.raises(NotFound):
        async with pond.db.org(pond.org_id) as con:
            await blocking.resume(con, pond.org_id, uuid.uuid4(), "user:test")


async def _until_no_lease(pond: Pond) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await pond.count("lease"):
            await asyncio.sleep(0.02)


async def _resume(pond: Pond, run_id: uuid.UUID) -> None:
    async with pond.db.org(pond.org_id) as con:
        readied = await blocking.resume(con, pond.org_id, run_id, "user:test")
    assert [one.queue for one in readied] == ["sql"]
    pond.hints.wake({one.queue for one in readied})
