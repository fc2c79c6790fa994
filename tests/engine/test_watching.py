"""A worker's watch over its session ends when it is told to."""

from __future__ import annotations

import asyncio
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import Hand

from millpond.db.embedded import Urls
from millpond.db.pool import EngineDatabase
from millpond.engine.hints import Hints
from millpond.engine.slots import Slots
from millpond.engine.submit import submit
from millpond.engine.watching import Watch


async def test_what_is_executed_is_looked_at_by_its_keys(pond: Pond) -> None:
    """Between whole looks: who shall stop is told, also a step whose run has ended, and a lost session is seen."""
    hand, lost, unwound = await Hand.register(pond), asyncio.Event(), list[str]()
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent("echo", n) for n in range(3)])
    claimed = await hand.claim()
    attempts: Any = [
        SimpleNamespace(claimed=one, unwind=lambda reason, n=n: unwound.append(f"{n} {reason}"))
        for n, one in enumerate(claimed)
    ]
    watch = Watch(
        pond.engine_db,
        Hints(pond.urls.engine),
        Slots({"default": 1}),
        worker_id=hand.worker_id,
        attempts=attempts,
        launching=set,
        look=asyncio.Event(),
        lost=lost,
    )
    await watch._watch_known()
    assert unwound == []
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update item set cancel_requested = true where item_id = $1", claimed[1].lease.item_id
        )
        await con.execute(
            "with i as (update item set kind = 'step', run_id = $2, step_key = 's', queue = 'default'"
            " where item_id = $1)"
            " update lease set run_id = $2 where item_id = $1",
            *(claimed[2].lease.item_id, uuid.uuid4()),
        )
    await watch._watch_known()
    assert sorted(unwound) == ["1 cancelled", "2 cancelled"]
    assert not lost.is_set()
    async with pond.engine_db.duty("test") as con:
        await con.execute("delete from worker where worker_id = $1", hand.worker_id)
    await watch._watch_known()
    assert lost.is_set()


@pytest.mark.parametrize("turns", range(5))
async def test_a_watch_that_is_ended_as_somebody_asks_for_a_look_ends(
    urls: Urls, engine_db: EngineDatabase, turns: int
) -> None:
    look, lost = asyncio.Event(), asyncio.Event()
    watch = Watch(
        engine_db,
        Hints(urls.engine),
        Slots({"default": 1}),
        worker_id=uuid.uuid4(),
        attempts=set(),
        launching=set,
        look=look,
        lost=lost,
    )
    watching = asyncio.create_task(watch.run())
    await lost.wait()  # it has looked
    for _ in range(10):
        await asyncio.sleep(0)
    look.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    watching.cancel()
    done, _ = await asyncio.wait({watching}, timeout=10)
    watching.cancel()
    assert done
