"""Children that many runs start and join at once, and runs that go to wait at once, share transactions."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.test_faults import _lease, _step

from millpond.engine.commit import FinishWrite
from millpond.engine.family import Birth, Family, Join, Wish
from millpond.engine.leases import Lease
from millpond.engine.resting import Rest, Resting, rest_all, rest_alone
from millpond.engine.waits import Readied
from millpond.errors import InvalidInput, LeaseLost, NotFound, Permanent


def birth(lease: Lease, flow: str = "idle", key: str = "idle:0") -> Birth:
    wish = Wish(
        flow=flow,
        version=None,
        queue=None,
        timeout_s=None,
        input=b"1",
        priority=None,
        urgency="standard",
        labels=None,
        keys=(),
        delay_s=0.0,
        deadline_s=None,
        close="cancel",
        is_by_name=True,
    )
    return Birth(lease=lease, step_key=key, seq=0, name="idle", wish=wish)


def join(lease: Lease, child_id: uuid.UUID, key: str = "join idle:0") -> Join:
    return Join(lease=lease, step_key=key, seq=1, name="idle", child_id=child_id)


async def publish(pond: Pond) -> None:
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into flow_version (flow, version, queue, input_schema) values ('idle', 1, 'default', 'null')"
        )


async def all_of(asked: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*asked, return_exceptions=True)


async def test_each_of_many_has_its_own_child_or_its_own_error(pond: Pond) -> None:
    await publish(pond)
    async with _lease(pond, 4) as (leases, _):
        stale = leases[3]._replace(token=uuid.uuid4())
        family = Family(pond.engine_db)
        births = [
            birth(leases[0]),
            birth(leases[0], key="idle:1"),
            birth(leases[1], flow="unheard_of"),
            birth(leases[2]),
            birth(stale),
        ]
        first, second, unknown, third, gone = await all_of([family.start(one) for one in births])
        assert isinstance(unknown, NotFound)
        assert isinstance(gone, LeaseLost)
        again = await all_of([family.start(one) for one in births[:2]])
        assert [one for one, _ in again] == [first[0], second[0]], "asked again they are the same"
        await family.close()
        assert await pond.count("run", "parent_id is not null") == 3
        assert await pond.count("step", "kind = 'child'") == 3
        told = [one for one in await pond.events(leases[0].run_id) if one.kind == "child.started"]
        assert [one.data["run_id"] for one in told] == [str(first[0]), str(second[0])]
        assert await pond.count("item", "duties > 0 and kind = 'run'") >= 2
        assert third[1] == "default"


async def test_a_name_that_the_database_refuses_fails_its_own_child_alone(pond: Pond) -> None:
    await publish(pond)
    async with _lease(pond, 3) as (leases, _):
        family = Family(pond.engine_db)
        bad, *good = await all_of(
            [family.start(birth(leases[0], flow="a\0b"))]
            + [family.start(birth(lease)) for lease in leases[1:]]
        )
        await family.close()
        assert isinstance(bad, InvalidInput)
        assert [queue for _, queue in good] == ["default", "default"]
        assert await pond.count("run", "parent_id is not null") == 2


async def test_a_join_that_is_at_fault_leaves_nothing_and_its_neighbours_stand(pond: Pond) -> None:
    await publish(pond)
    async with _lease(pond, 3) as (leases, _):
        family = Family(pond.engine_db)
        (mine, _), (others, _) = await asyncio.gather(
            family.start(birth(leases[0])), family.start(birth(leases[1]))
        )
        going_on, not_mine, missing = await all_of(
            [
                family.join(join(leases[0], mine)),
                family.join(join(leases[2], others)),
                family.join(join(leases[1], uuid.uuid4())),
            ]
        )
        await family.close()
        assert going_on is None
        assert isinstance(not_mine, Permanent)
        assert isinstance(missing, NotFound)
        assert await pond.count("step", "kind = 'join'") == 1


async def test_a_join_of_a_child_that_is_over_has_its_end_at_once(pond: Pond) -> None:
    await publish(pond)
    async with _lease(pond, 2) as (leases, _):
        family = Family(pond.engine_db)
        children = [(await family.start(birth(lease)))[0] for lease in leases]
        async with pond.engine_db.duty("test") as con:
            await con.execute(
                "update run set outcome = 'succeeded', output = '7', finished_at = now() where run_id = $1",
                children[0],
            )
        over, going_on = await all_of(
            [family.join(join(*one)) for one in zip(leases, children, strict=True)]
        )
        await family.close()
        assert (over.state, over.output, going_on) == ("done", "7", None)
        kinds = await pond.kinds(leases[0].run_id)
        assert kinds[-2:] == ["child.started", "child.ended"]


async def test_of_runs_that_rest_at_once_those_go_on_whose_wait_is_over(pond: Pond) -> None:
    async with _lease(pond, 4) as (leases, committer):
        await committer.record(_step(leases[1], key="wait:0"))
        stale = leases[3]._replace(token=uuid.uuid4())
        gone = Rest(lease=stale, step_keys=["wait:0"], is_human=False)
        with pytest.raises(LeaseLost):
            await rest_alone(pond.engine_db, gone)
        rests = [
            Rest(lease=leases[0], step_keys=["wait:0"], is_human=False),
            Rest(lease=leases[1], step_keys=["other:0", "wait:0"], is_human=False),
            Rest(lease=leases[2], step_keys=["wait:0", "wait:1"], is_human=True),
            gone,
        ]
        waits, goes, asks, lost = await rest_all(pond.engine_db, rests)
        assert (waits, asks) == (None, None)
        assert isinstance(goes, Readied)
        assert isinstance(lost, LeaseLost)
        async with pond.engine_db.duty("test") as con:
            rows = await con.fetch("select run_id, state from item")
            used = await con.fetch(
                "select unnest(runs) as runs, unnest(worker_s) as s from usage_part"
            )
        assert {row["run_id"]: row["state"] for row in rows} == {
            leases[0].run_id: "waiting",
            leases[1].run_id: "queued",
            leases[2].run_id: "awaiting_input",
            leases[3].run_id: "running",
        }
        assert sum(row["runs"] for row in used) == 3
        assert all(row["s"] > 0 for row in used)
        assert await pond.count("lease") == 1
        assert (await pond.kinds(leases[0].run_id))[-1] == "run.waiting"
        assert (await pond.kinds(leases[2].run_id))[-1] == "run.awaiting_input"
        with pytest.raises(LeaseLost):
            await committer.finish(
                FinishWrite(lease=leases[0], outcome="succeeded", event_data="{}")
            )


async def test_very_many_children_of_one_parent_start_together(pond: Pond) -> None:
    await publish(pond)
    async with _lease(pond, 1) as ([lease], _):
        family = Family(pond.engine_db)
        started = await asyncio.gather(
            *(family.start(birth(lease, key=f"idle:{nth}")) for nth in range(230))
        )
        joined = await asyncio.gather(
            *(
                family.join(join(lease, child_id, key=f"join idle:{nth}"))
                for nth, (child_id, _) in enumerate(started)
            )
        )
        await family.close()
        assert joined == [None] * 230
        assert await pond.count("run", "parent_id is not null") == 230
        numbers = [one.event_no for one in await pond.events(lease.run_id)]
        assert numbers == list(range(1, 233))


async def test_a_row_that_a_caller_holds_keeps_no_other_run_from_resting(pond: Pond) -> None:
    async with _lease(pond, 3) as (leases, _):
        resting = Resting(pond.engine_db)
        async with pond.engine_db.duty("test") as con:
            await con.execute("select from item where item_id = $1 for update", leases[1].item_id)
            asked = [
                asyncio.ensure_future(
                    resting.rest(Rest(lease=lease, step_keys=["wait:0"], is_human=False))
                )
                for lease in leases
            ]
            async with asyncio.timeout(10):
                assert (await asked[0], await asked[2]) == (None, None)
            assert not asked[1].done()
        async with asyncio.timeout(10):
            assert await asked[1] is None
        await resting.close()
        assert await pond.count("item", "state = 'waiting'") == 3


async def test_a_run_that_shall_stop_does_not_rest_among_others(pond: Pond) -> None:
    async with _lease(pond, 2) as (leases, _):
        async with pond.engine_db.duty("test") as con:
            await con.execute(
                "update item set cancel_requested = true where item_id = $1", leases[0].item_id
            )
        resting = Resting(pond.engine_db)
        stops, waits = await asyncio.gather(
            *(
                resting.rest(Rest(lease=lease, step_keys=["wait:0"], is_human=False))
                for lease in leases
            )
        )
        await resting.close()
        assert isinstance(stops, Readied)
        assert waits is None
