"""A claim in one message leaves what the decided claim leaves of the same queue: work, lanes, shares, clocks."""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.engine.claim import Claimer
from millpond.engine.submit import submit

STATE = {
    "lane": "select org_id, lane_id, cursor_rank, active from lane order by 1, 2",
    "share": "select org_id, queue, round(virtual_s::numeric, 6), active from share order by 1, 2",
    "fair_clock": "select queue, round(virtual_s::numeric, 6) from fair_clock order by 1",
    "lease": "select org_id, item_id, lane_id, queue, keys, attempt from lease order by 1, 2",
    "ready": "select * from ready order by 1, 2, 3, 4",
    "arrival": "select count(*) from arrival",
    "event": "select org_id, run_id, event_no, kind, data::text from event order by 1, 2, 3",
}
COSTS = {"short@1": 0.02, "long@1": 1.5}
# Of this session; the difference of two is what was done in between.
_LANES_WRITTEN = "select n_tup_ins + n_tup_upd from pg_stat_xact_user_tables where relname = 'lane'"


class _UndoneError(Exception):
    """Ends a transaction whose work was only to be looked at."""


async def _state(con: Connection) -> dict[str, list[tuple[Any, ...]]]:
    return {table: [tuple(row) for row in await con.fetch(sql)] for table, sql in STATE.items()}


async def _register(pond: Pond) -> uuid.UUID:
    worker_id = uuid.uuid4()
    async with pond.engine_db.duty("register") as con:
        await con.execute(
            queries("maintenance")["register_worker"],
            worker_id, "here", 1, "{}", list(COSTS), 30.0, "0", "{}",
        )  # fmt: skip
    return worker_id


async def _fill(pond: Pond, org_ids: list[int], rng: random.Random) -> None:
    for org_id in org_ids:
        intents = [
            pond.intent(
                rng.choice(["short", "long"]),
                n,
                org_id=org_id,
                queue=rng.choice(["default", "llm"]),
                priority=rng.choice([0, 0, 5]),
            )
            for n in range(rng.randrange(1, 12))
        ]
        async with pond.db.org(org_id) as con:
            await submit(con, intents)


class _Decided(Claimer):
    """Always decides."""

    async def _claim_at_once(self, free: Mapping[str, int]) -> None:
        return None


@pytest.mark.parametrize("seed", range(6))
async def test_it_leaves_what_a_decision_leaves(pond: Pond, seed: int) -> None:
    rng = random.Random(seed)
    org_ids = [pond.org_id, *range(7001, 7001 + rng.randrange(1, 5))]
    worker_id, free = await _register(pond), {"default": 200, "llm": 200}
    claimer = _Decided(
        pond.engine_db,
        worker_id=worker_id,
        capabilities=list(COSTS),
        estimate_s=COSTS.__getitem__,
    )
    for _ in range(3):  # later rounds find lanes, shares and clocks of earlier ones
        await _fill(pond, org_ids, rng)
        async with pond.engine_db.duty("test") as con:
            await con.execute("update share set weight = 1 + org_id % 3")
        with pytest.raises(_UndoneError):
            async with pond.engine_db.duty("look") as con:
                claimer._depth = depth = 64
                told, *rows = await con.fetch(
                    queries("claim")["at_once"],
                    100, worker_id, uuid.uuid4(), list(free), list(free.values()), list(free.values()),
                    list(COSTS), list(COSTS.values()), depth, 0,
                )  # fmt: skip
                at_once = await _state(con)
                raise _UndoneError
        claimed, has_more = await claimer.claim(free)
        async with pond.engine_db.duty("test") as con:
            decided = await _state(con)
        assert at_once == decided
        assert {row["item_id"] for row in rows} == {one.lease.item_id for one in claimed}
        assert (told["attempt"], has_more) == (1, False)


async def _both_ways(
    pond: Pond, worker_id: uuid.UUID
) -> tuple[list[dict[str, list[tuple[Any, ...]]]], int]:
    """Return the state after a claim at once, undone, and after a decided one; and how many lanes the former wrote."""
    claimer = _Decided(
        pond.engine_db, worker_id=worker_id, capabilities=list(COSTS), estimate_s=COSTS.__getitem__
    )
    with pytest.raises(_UndoneError):
        async with pond.engine_db.duty("look") as con:
            before = await con.fetchval(_LANES_WRITTEN)
            await con.fetch(
                queries("claim")["at_once"],
                100, worker_id, uuid.uuid4(), ["default", "llm"], [4, 4], [4, 4],
                list(COSTS), list(COSTS.values()), 64, 0,
            )  # fmt: skip
            at_once = await _state(con)
            written = await con.fetchval(_LANES_WRITTEN) - before
            raise _UndoneError
    await claimer.claim({"default": 4, "llm": 4})
    async with pond.engine_db.duty("test") as con:
        return [at_once, await _state(con)], written


async def test_one_that_came_alone_leaves_what_a_decision_leaves(pond: Pond) -> None:
    worker_id = await _register(pond)
    for nth, (flow, queue, org_id) in enumerate(
        [
            ("short", "default", pond.org_id),
            ("short", "default", pond.org_id),
            ("long", "default", pond.org_id),
            ("short", "default", 7001),
            ("short", "llm", 7001),
            ("short", "default", pond.org_id),
        ]
    ):
        async with pond.db.org(org_id) as con:
            await submit(con, [pond.intent(flow, nth, org_id=org_id, queue=queue)])
        async with pond.engine_db.duty("test") as con:
            await con.execute("update share set weight = 1 + org_id % 3")
        (at_once, decided), written = await _both_ways(pond, worker_id)
        assert at_once == decided
        # The short way: a lane is made where there was none, and never made active for a moment.
        assert written == (0 if nth in (1, 5) else 1)


@pytest.mark.parametrize("other", ["two", "org", "pause", "queue", "flow"])
async def test_what_did_not_come_alone_goes_the_long_way(pond: Pond, other: str) -> None:
    worker_id = await _register(pond)
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent("short", 0)])
    await _both_ways(pond, worker_id)
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent("short", 1)])
        if other == "two":
            await submit(con, [pond.intent("short", 2)])
        elif other == "flow":
            await submit(con, [pond.intent("long", 2)])
    if other == "pause":
        async with pond.db.org(pond.org_id) as con:
            await con.execute(
                "insert into pause (org_id, queue, flow, paused_by) values ($1, 'llm', '', 'user:x')",
                pond.org_id,
            )
    if other == "queue":
        async with pond.db.globals() as con:
            await con.execute("insert into queue_pause (queue, paused_by) values ('llm', 'user:x')")
    if other == "org":
        async with pond.db.org(7001) as con:
            await submit(con, [pond.intent("short", 2, org_id=7001)])
    (at_once, decided), written = await _both_ways(pond, worker_id)
    assert at_once == decided
    assert written > 0


async def test_one_that_somebody_holds_locked_stays_as_it_came(pond: Pond) -> None:
    worker_id = await _register(pond)
    claimer = Claimer(
        pond.engine_db, worker_id=worker_id, capabilities=list(COSTS), estimate_s=COSTS.__getitem__
    )
    async with pond.db.org(pond.org_id) as con:
        (held,) = await submit(con, [pond.intent("short", 0)])
    async with pond.engine_db.duty("holder") as con:
        await con.execute("select from item where item_id = $1 for update", held)
        claimed, _ = await claimer.claim({"default": 4})
        assert not claimed
    claimed, _ = await claimer.claim({"default": 4})
    assert [one.lease.run_id for one in claimed] == [held]


async def test_nothing_is_taken_where_not_all_has_room(pond: Pond) -> None:
    worker_id = await _register(pond)
    claimer = Claimer(
        pond.engine_db, worker_id=worker_id, capabilities=list(COSTS), estimate_s=COSTS.__getitem__
    )
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent("short", n) for n in range(5)])
    assert await claimer._claim_at_once({"default": 4}) is None
    assert (await pond.count("lease"), await pond.count("ready")) == (0, 5)
    claimed, has_more = await claimer.claim({"default": 4})
    assert (len(claimed), has_more) == (4, False)


async def test_nothing_is_taken_where_more_stands_behind_what_is_read(pond: Pond) -> None:
    worker_id = await _register(pond)
    claimer = Claimer(
        pond.engine_db, worker_id=worker_id, capabilities=list(COSTS), estimate_s=COSTS.__getitem__
    )
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent("short", n) for n in range(30)])
    claimer._depth = 4
    assert await claimer._claim_at_once({"default": 100}) is None
    assert await pond.count("ready") == 30


async def test_a_row_that_somebody_holds_locked_is_left_to_a_decision(pond: Pond) -> None:
    worker_id = await _register(pond)
    claimer = Claimer(
        pond.engine_db, worker_id=worker_id, capabilities=list(COSTS), estimate_s=COSTS.__getitem__
    )
    async with pond.db.org(pond.org_id) as con:
        held, other = await submit(con, [pond.intent("short", n) for n in range(2)])
    async with pond.engine_db.duty("holder") as con:
        await con.execute("select from item where item_id = $1 for update", held)
        claimed, _ = await claimer.claim({"default": 4})
    assert [one.lease.run_id for one in claimed] == [other]
    claimed, _ = await claimer.claim({"default": 4})
    assert [one.lease.run_id for one in claimed] == [held]


async def test_it_is_not_tried_in_vain_while_a_backlog_is_drained(pond: Pond) -> None:
    passed: list[str] = []

    async def hear(point: str) -> None:
        passed.append(point)

    worker_id = await _register(pond)
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent("short", n) for n in range(18)])
    database = await EngineDatabase.connect(pond.urls.engine, probe=hear)
    try:
        claimer = Claimer(
            database, worker_id=worker_id, capabilities=list(COSTS), estimate_s=COSTS.__getitem__
        )
        got = [len((await claimer.claim({"default": 4, "llm": 4}))[0]) for _ in range(6)]
    finally:
        await database.close()
    assert got == [4, 4, 4, 4, 2, 0]
    # At first, when nothing is known, and again when the last claim had room to spare.
    assert [point for point in passed if point.startswith("before:")] == [
        "before:claim_at_once",
        *["before:claim"] * 5,
        "before:claim_at_once",
    ]
