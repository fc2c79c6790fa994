"""The agenda: one look names what there is to be done, and a worker at rest asks for nothing else."""

from __future__ import annotations

import asyncio
import uuid
from itertools import cycle
from typing import get_args

import pytest
from tests.engine.conftest import DEADLINE_S, Pond, direct

from millpond.db.pool import EngineDatabase
from millpond.engine import upkeep
from millpond.engine.agenda import Question, Task, Todo, look
from millpond.engine.context import Context
from millpond.engine.worker import Worker
from millpond.errors import Unavailable

EVERYTHING = Question(
    dead=True,
    orphans=True,
    rare=True,
    spent=True,
    usage=True,
    abilities=["f@1!"],
    queues=["default"],
)
SOME: dict[Task, str] = {
    "timers": "insert into timer (org_id, run_id, step_key, kind, due_at)"
    " values ($1, $2, 's', 'sleep', clock_timestamp() - interval '1 second')",
    "schedules": "insert into schedule (org_id, schedule_id, name, flow, cron, next_due_at, created_by)"
    " values ($1, $2, 's', 'f', '@daily', clock_timestamp() - interval '1 second', 'user:ann')",
    "groups": "insert into trigger_group (org_id, trigger_id, group_key, due_at)"
    " values ($1, $2, 'k', clock_timestamp() - interval '1 second')",
    "chores": "insert into chore (org_id, kind, run_id, asked_by) values ($1, 'cancel', $2, 'user:ann')",
    "spent": "insert into usage_part (part_id, orgs, flows, models) values ($2, array[$1], '{f}', '{m}')",
    "usage": "insert into usage_part (part_id, orgs, flows) values ($2, array[$1], '{f}')",
    "dead": "insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)"
    " values ($1, $2, $2, 1, 'default', '{}', $2, 1, $2)",
    "meters": "insert into meter (room, tat_us) select 'rate:gone', 1 where $1 > 0 and $2 is not null",
    "brakes": "insert into brake (owner, key, until_us, factor, in_use, hits, over_us, step, reason)"
    " select 0, 'provider:gone', 1, 0.5, 1, 1, 1, 's', 'down' where $1 > 0 and $2 is not null",
    "tokens": "insert into lease_use (org_id, item_id, token, keys, tokens, carried)"
    " values ($1, $2, $2, '{}', 1, '{}')",
    "lines": "insert into step_lease (org_id, item_id, step_key, token, keys)"
    " values ($1, $2, 's', $2, '{}')",
    "crossings": "insert into crossing (room, virtual_s)"
    " select 'r', 0 where $1 > 0 and $2 is not null",
    "deltas": "insert into delta (org_id, run_id, step_key, attempt, tries, n, item_id, text)"
    " values ($1, $2, 's', 1, 0, 1, $2, 'x')",
    "suspects": "insert into arrival (org_id, lane_id, queue, capability, keys, offset_us, min_rank)"
    " select $1, 2, 'default', 'f@1!', '{}', 0, 1 where $2 is not null",
}


async def test_where_nothing_is_to_be_done_nothing_is_named(pond: Pond) -> None:
    seen = await look(pond.engine_db, EVERYTHING)
    assert seen.todo == frozenset()
    assert seen.due_s is None
    assert seen.uptime_s > 0


@pytest.mark.parametrize("task", SOME)
async def test_what_there_is_to_be_done_is_named(pond: Pond, task: Task) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            SOME[task].replace("$1", "$1::bigint").replace("$2", "$2::uuid"), 1, uuid.uuid4()
        )
    assert (await look(pond.engine_db, EVERYTHING)).todo == {task}


async def test_what_is_not_asked_for_is_not_looked_for(pond: Pond) -> None:
    for statement in SOME.values():
        async with pond.engine_db.duty("test") as con:
            await con.execute(
                statement.replace("$1", "$1::bigint").replace("$2", "$2::uuid"), 1, uuid.uuid4()
            )
    found = (await look(pond.engine_db, Question())).todo
    assert found == {"timers", "groups", "chores", "schedules"}
    assert (await look(pond.engine_db, EVERYTHING)).todo == SOME.keys() == set(get_args(Task))


async def test_a_look_tells_when_the_next_timer_is_due_and_leaves_what_is_paused(
    pond: Pond,
) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into timer (org_id, run_id, step_key, kind, due_at)"
            " values (1, $1, 's', 'sleep', clock_timestamp() + interval '1 hour')",
            uuid.uuid4(),
        )
        await con.execute(
            "insert into schedule"
            " (org_id, schedule_id, name, flow, cron, next_due_at, created_by, is_paused)"
            " values (1, $1, 's', 'f', '@daily', clock_timestamp() - interval '1 second', 'user:ann', true)",
            uuid.uuid4(),
        )
    seen = await look(pond.engine_db, EVERYTHING)
    assert seen.todo == frozenset()
    assert seen.due_s is not None
    assert 3500 < seen.due_s <= 3600


async def test_what_was_found_waits_until_its_loop_takes_it() -> None:
    todo = Todo()
    chores: frozenset[Task] = frozenset(("chores",))
    others: frozenset[Task] = frozenset(("timers", "dead"))
    waiting = asyncio.create_task(todo.take(others))
    await asyncio.sleep(0)
    todo.add(("chores",))
    assert await todo.take(chores) == {"chores"}
    assert not waiting.done()
    todo.add(("dead",))
    todo.add(("timers", "chores"))
    assert await waiting == {"dead", "timers"}
    assert await todo.take(chores) == {"chores"}


async def test_where_nobody_can_look_what_is_due_is_done_all_the_same(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def naps(ctx: Context, _: None) -> str:
        await ctx.sleep(1.5)
        return "awake"

    errors = cycle([Unavailable("somebody has a table for himself"), TimeoutError()])

    async def fails(*_: object) -> None:
        raise next(errors)

    monkeypatch.setattr(upkeep, "look", fails)
    pond.flow(naps)
    async with pond.worker():
        run_id = await pond.submit("naps")
        await pond.until(run_id, "run.waiting")
        assert (await pond.ended(run_id))["output"] == "awake"


async def test_a_worker_at_rest_does_nothing_but_look(pond: Pond) -> None:
    passed: list[str] = []
    looked = asyncio.Event()

    async def probe(point: str) -> None:
        passed.append(point)
        if passed.count("after:look") == 6:
            looked.set()

    watched = await EngineDatabase.connect(pond.urls.engine, probe=probe)
    worker = Worker(
        database=watched,
        engine_url=pond.urls.engine,
        listen_url=direct(pond.urls).engine,
        flows=[],
        slots={"default": 1},
        lease_s=2.0,
    )
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    try:
        async with asyncio.timeout(DEADLINE_S):
            await looked.wait()
        rest = {point.partition(":")[2] for point in passed}
    finally:
        stop.set()
        await running
        await watched.close()
    assert rest - {"publish", "register"} <= {
        *("look", "watch", "claim_at_once", "free_claim", "sample_look", "sample"),
    }
