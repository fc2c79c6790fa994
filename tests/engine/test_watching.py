"""A worker's watch over its session ends when it is told to."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from millpond.db.embedded import Urls
from millpond.db.pool import EngineDatabase
from millpond.engine.hints import Hints
from millpond.engine.slots import Slots
from millpond.engine.watching import Watch


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
