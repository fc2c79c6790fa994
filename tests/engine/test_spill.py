"""Spill with a worker on Postgres: a surge fills idle slots of other queues, and their own work starts all the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from tests.engine.conftest import DEADLINE_S, Pond
from tests.engine.parking import Hand
from tests.engine.test_slots import _claimed
from tests.engine.test_why import only, register

from millpond.engine.admission import Terms
from millpond.engine.claim import Claimer
from millpond.engine.context import Context
from millpond.engine.leases import Claimed
from millpond.engine.pauses import Scope, pause
from millpond.engine.queues import list_queues, list_workers
from millpond.engine.registry import Flow
from millpond.engine.slots import Slots
from millpond.engine.spilling import Spill
from millpond.engine.submit import submit
from millpond.engine.worker import Worker

HELPS = {"default": ["sql"]}


def _got(queue: str, helper: str | None = None) -> Claimed:
    return _claimed(queue)._replace(helper=helper)


class Gates:
    """Runs that go on until they are let; `running` holds their inputs."""

    def __init__(self, pond: Pond) -> None:
        self.pond = pond
        self.running: set[str] = set()
        self._open: set[str] = set()
        self._changed = asyncio.Condition()
        self.flows: dict[str, Flow] = {}

    def flow(self, queue: str) -> Flow:
        async def wait(ctx: Context, name: str) -> None:
            async with self._changed:
                self.running.add(name)
                self._changed.notify_all()
                await self._changed.wait_for(lambda: name in self._open)
                self.running.discard(name)
                self._changed.notify_all()

        return self.pond.flow(wait, name=f"in_{queue}", queue=queue)

    async def open(self, *names: str) -> None:
        async with self._changed:
            self._open.update(names)
            self._changed.notify_all()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(is_so)


async def _used(pond: Pond) -> dict[str, int]:
    """Return the slots in use by queue, as the worker tells them; it does so within two seconds."""
    async with pond.engine_db.duty("test") as con:
        return json.loads(await con.fetchval("select in_use from worker"))


async def _eventually(told: Callable[[], Awaitable[object]], wanted: object) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await told() != wanted:
            await asyncio.sleep(0.05)


async def test_a_surge_fills_idle_slots_and_own_work_starts_at_the_next_free_one(
    pond: Pond,
) -> None:
    gates = Gates(pond)
    surge, own = gates.flow("sql"), gates.flow("default")
    slots, spill = {"default": 3, "sql": 1}, Spill(helps=HELPS)
    async with pond.worker(slots=slots, spill=spill):
        ids = [await pond.submit(surge, f"sql{n}") for n in range(8)]
        await gates.until(lambda: len(gates.running) == 4)
        await _eventually(lambda: _used(pond), {"default": 3, "sql": 1})
        assert await pond.count("lease", "queue = 'sql'") == 4
        ids.append(await pond.submit(own, "own"))
        first = sorted(gates.running)
        for name in first:
            # Whichever of them has the slot of `sql`: its next holder is of `sql`, the next of `default` is not.
            await gates.open(name)
            await gates.until(lambda name=name: name not in gates.running)
            await gates.until(lambda: len(gates.running) == 4)
            if "own" in gates.running:
                break
        assert first.index(name) <= 1, "two slots were free, one of them of the run's queue"
        await gates.open("own", *(f"sql{n}" for n in range(8)))
        for run_id in ids:
            await pond.ended(run_id)
        await _eventually(lambda: _used(pond), {})


async def test_kept_slots_stay_free_for_own_work(pond: Pond) -> None:
    gates = Gates(pond)
    surge, own = gates.flow("sql"), gates.flow("default")
    spill = Spill(helps=HELPS, keep={"default": 2})
    async with pond.worker(slots={"default": 4, "sql": 1}, spill=spill):
        ids = [await pond.submit(surge, f"sql{n}") for n in range(8)]
        await gates.until(lambda: len(gates.running) == 3)
        await _eventually(lambda: _used(pond), {"default": 2, "sql": 1})
        ids += [await pond.submit(own, f"own{n}") for n in range(2)]
        await gates.until(lambda: {"own0", "own1"} <= gates.running)
        assert len(gates.running) == 5
        await gates.open("own0", "own1", *(f"sql{n}" for n in range(8)))
        for run_id in ids:
            await pond.ended(run_id)


async def test_a_queue_without_slots_of_its_own_is_served_by_what_helps_it(pond: Pond) -> None:
    gates = Gates(pond)
    surge = gates.flow("sql")
    async with pond.worker(slots={"default": 2}, spill=Spill(helps=HELPS)):
        ids = [await pond.submit(surge, f"sql{n}") for n in range(6)]
        for n in range(0, 6, 2):
            both = {f"sql{n}", f"sql{n + 1}"}
            await gates.until(lambda both=both: gates.running == both)
            await gates.open(*both)
        for run_id in ids:
            await pond.ended(run_id)
        async with pond.engine_db.duty("test") as con:
            (worker,) = await list_workers(con)
        assert worker.queues == {"default": 2, "sql": 0}
        assert worker.spill == {"helps": HELPS, "keep": {}, "reserve": {}}
        async with pond.db.org(pond.org_id) as con:
            found = {one.name: one for one in await list_queues(con, pond.org_id)}
        assert (found["sql"].workers, found["sql"].slots) == (1, 0)


async def test_work_of_a_queue_that_is_only_helped_can_be_executed_alone(pond: Pond) -> None:
    async def echo(ctx: Context, n: int) -> int:
        return n

    run_id = await pond.submit(pond.flow(echo, queue="sql"), 5)
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)"
            " select org_id, lane_id, queue, 'echo@1!', keys, offset_us, min_rank, true from arrival"
        )
    worker = Worker(
        database=pond.engine_db,
        engine_url=pond.urls.engine,
        listen_url=pond.urls.engine,
        flows=list(pond.registry.flows.values()),
        slots={"default": 2},
        spill=Spill(helps=HELPS),
        alone=True,
    )
    async with asyncio.timeout(DEADLINE_S):
        await worker.run(asyncio.Event())
    assert worker.has_worked
    assert (await pond.ended(run_id))["output"] == 5


async def test_time_in_a_slot_that_was_lent_is_charged_in_the_queue_of_the_work() -> None:
    slots = Slots({"default": 2}, Spill(helps=HELPS))
    slot = slots.take("sql", "default")
    assert slots.free() == {"default": 1}
    slot.start(7, "f@1")
    (use,) = slots.charges._live
    assert (use.org_id, use.queue) == (7, "sql")
    slot.give()
    assert slots.free() == {"default": 2}


@pytest.mark.parametrize(
    ("queues", "kind"), [('{"default": 4, "sql": 0}', "in_line"), ('{"default": 4}', "no_worker")]
)
async def test_why_counts_a_queue_that_is_only_helped_as_served(
    pond: Pond, queues: str, kind: str
) -> None:
    await register(pond, queues)
    reason = await only(pond, await pond.submit("idle", queue="sql"))
    assert reason.kind == kind
    if kind == "in_line":
        assert reason.text.endswith("only idle slots of others help it.")


# The claim


async def _send(pond: Pond, queue: str, count: int, *, org_id: int | None = None) -> None:
    org = org_id or pond.org_id
    async with pond.db.org(org) as con:
        await submit(con, [pond.intent("echo", n, queue=queue, org_id=org) for n in range(count)])


async def _claim(
    claimer: Claimer, slots: dict[str, int], spill: Spill
) -> tuple[list[tuple[str, str | None]], bool]:
    claimed, has_more = await claimer.claim(slots, spill.terms(slots, slots))
    return sorted(((one.queue, one.helper) for one in claimed), key=str), has_more


async def test_a_claim_lends_what_own_work_leaves_and_says_whose_slot_it_is(pond: Pond) -> None:
    hand = await Hand.register(pond)
    spill = Spill(helps=HELPS, keep={"default": 1})
    await _send(pond, "default", 2)
    await _send(pond, "sql", 9)
    claimed, _ = await _claim(hand.claimer, {"default": 6, "sql": 2}, spill)
    lent, own = [("sql", "default")] * 3, [("default", None)] * 2 + [("sql", None)] * 2
    assert sorted(claimed, key=str) == sorted([*own, *lent], key=str)
    assert await pond.count("lease", "queue = 'sql'") == 5


async def test_all_that_has_room_of_its_own_is_claimed_in_one_message(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a queue that may be helped has no slot free, the one message would not look there."""
    hand = await Hand.register(pond)
    asked: list[dict[str, int]] = []
    real = Claimer._claim_at_once

    async def spied(self: Claimer, free: dict[str, int]) -> object:
        asked.append(dict(free))
        return await real(self, free)

    monkeypatch.setattr(Claimer, "_claim_at_once", spied)
    await _send(pond, "sql", 2)
    claimed, _ = await hand.claimer.claim({"default": 4, "sql": 4}, Terms(helps=HELPS))
    assert [one.helper for one in claimed] == [None, None]
    await _send(pond, "sql", 2)
    claimed, _ = await hand.claimer.claim({"default": 4}, Terms(helps=HELPS))
    assert [one.helper for one in claimed] == ["default", "default"]
    assert asked == [{"default": 4, "sql": 4}]


async def test_a_claim_that_reads_not_all_of_the_own_work_lends_nothing_yet(pond: Pond) -> None:
    hand = await Hand.register(pond)
    hand.claimer._depth, hand.claimer._lanes = 2, 256
    await _send(pond, "default", 5)
    await _send(pond, "sql", 5)
    claimed, has_more = await _claim(hand.claimer, {"default": 8}, Spill(helps=HELPS))
    assert claimed == [("default", None)] * 2
    assert has_more
    while has_more:
        more, has_more = await _claim(
            hand.claimer, {"default": 8 - len(claimed)}, Spill(helps=HELPS)
        )
        claimed += more
    assert claimed == [("default", None)] * 5 + [("sql", "default")] * 3


async def test_a_paused_queue_is_not_helped_and_helps(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await _send(pond, "default", 3)
    await _send(pond, "sql", 3)
    spill = Spill(helps={"default": ["sql"], "sql": ["default"]})
    async with pond.db.org(pond.org_id) as con:
        await pause(con, pond.org_id, Scope(queue="sql"), "user:test", "")
    claimed, has_more = await _claim(hand.claimer, {"default": 2, "sql": 4}, spill)
    assert sorted(claimed, key=str) == [("default", "sql"), ("default", None), ("default", None)]
    assert not has_more


# Reserve


async def test_an_org_above_its_share_leaves_reserved_slots_and_a_newcomer_takes_them(
    pond: Pond, other_org: int
) -> None:
    hand = await Hand.register(pond)
    spill = Spill(reserve={"sql": 2})
    await _send(pond, "sql", 20)
    claimed, has_more = await _claim(hand.claimer, {"sql": 6}, spill)
    assert (len(claimed), has_more) == (4, False)
    assert await _claim(hand.claimer, {"sql": 2}, spill) == ([], False)
    await _send(pond, "sql", 3, org_id=other_org)
    claimed, _ = await hand.claimer.claim({"sql": 2}, spill.terms({"sql": 2}, {"sql": 2}))
    assert {one.lease.org_id for one in claimed} == {other_org}


async def test_a_worker_does_not_claim_in_a_hurry_for_slots_that_stay_free() -> None:
    slots = Slots({"sql": 6}, Spill(reserve={"sql": 2}))
    wanted = slots.wanted()
    assert wanted == {"sql": 6}
    for _ in range(4):
        slots.take("sql")
    slots.expect()
    slots.note_claim(wanted, [_got("sql")] * 4, slots.terms(wanted))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await slots.wait(10)


def test_a_queue_with_slots_left_that_a_claim_does_not_fill_gets_no_help() -> None:
    slots = Slots({"default": 100, "sql": 20}, Spill(helps={"default": ["sql"]}))
    slots.take("sql")
    slots.give("sql", "f@1", 5.0)
    wanted = slots.wanted()
    assert wanted["sql"] == 5
    assert slots.terms(wanted).helps == {"default": []}
    for _ in range(16):
        slots.take("sql")
    assert slots.terms(slots.wanted()).helps == {"default": ["sql"]}, "that is all it has"


async def test_the_end_of_what_a_slot_was_lent_for_is_a_reason_to_claim_while_more_may_wait() -> (
    None
):
    slots = Slots({"default": 4}, Spill(helps=HELPS, keep={"default": 1}))
    wanted = slots.wanted()
    terms = slots.terms(wanted)
    held = [slots.take("sql", "default") for _ in range(3)]
    slots.expect()
    slots.note_claim(wanted, [_got("sql", "default")] * 3, terms)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await slots.wait(10)
    held.pop().give_unused(1, "")
    async with asyncio.timeout(20):
        await slots.wait(10)
    slots.expect()
    wanted = slots.wanted()
    slots.note_claim(wanted, [], slots.terms(wanted))
    held.pop().give_unused(1, "")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await slots.wait(10)
