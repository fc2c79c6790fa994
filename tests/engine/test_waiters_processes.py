"""Steps that wait beside working branches, over worker processes, of which one is killed: later work does not pass."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.engine.conftest import Pond
from tests.engine.limited_process import limited, limited_beside
from tests.engine.test_limits import limit
from tests.engine.test_limits_processes import Sink, begin, listening
from tests.engine.test_step_keys import nothing_left, until

LATER = [f"later {nth}" for nth in range(6)]


class Door:
    """Those who stand before it stay until it is opened."""

    def __init__(self) -> None:
        self.port = 0
        self._opened = asyncio.Event()

    def open(self) -> None:
        self._opened.set()

    async def serve(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._opened.wait()
        writer.close()


@asynccontextmanager
async def closed_door() -> AsyncIterator[Door]:
    door = Door()
    server = await asyncio.start_server(door.serve, "127.0.0.1", 0)
    door.port = server.sockets[0].getsockname()[1]
    try:
        yield door
    finally:
        door.open()
        server.close()


@asynccontextmanager
async def two(pond: Pond, lease_s: float = 4.0) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Two worker processes, each with more slots than there is work."""
    processes = [await begin(pond, slots=12, lease_s=lease_s) for _ in range(2)]
    try:
        await until(pond, "worker", "expires_at > clock_timestamp()", 2)
        yield processes
    finally:
        for process in processes:
            if process.returncode is None:
                process.terminate()
        for process in processes:
            await process.wait()


async def all_in_line(pond: Pond, sink: Sink, door: Door) -> list[uuid.UUID]:
    """Let two steps wait beside working branches, one after the other, and then more runs."""
    data = {"port": sink.port, "door": door.port, "for_s": 0.05}
    runs = []
    for nth, name in enumerate(("a", "b"), 1):
        runs.append(await pond.submit(limited_beside, {**data, "name": name}))
        await until(pond, "step_lease", "since_us is not null", nth)
    for name in LATER:
        runs.append(await pond.submit(limited, {**data, "name": name}))
    await until(pond, "ready", count=len(LATER))
    await until(pond, "lane", "parked_on is not null and not active")
    return runs


async def test_later_work_of_another_process_does_not_pass_a_step_that_waits(pond: Pond) -> None:
    async with listening() as sink, closed_door() as door, two(pond, lease_s=30.0):
        await limit(pond.db, "provider:sink", 1)
        holder = {"port": sink.port, "door": door.port, "for_s": 600.0, "name": "holder"}
        await pond.submit(limited_beside, holder)
        await sink.busy()
        runs = await all_in_line(pond, sink, door)
        await limit(pond.db, "provider:sink", 2)
        async with asyncio.timeout(30):
            while len(sink.names) < 2 + len(LATER):
                await asyncio.sleep(0.02)
        assert sink.names == ["a", "b", *LATER]
        door.open()
        for run_id in runs:
            assert (await pond.ended(run_id))["outcome"] == "succeeded"
        assert sink.most == 2


@pytest.mark.parametrize("who", ["the one that waits", "the other"])
async def test_who_waits_and_is_killed_holds_up_nobody_for_longer_than_its_lease(
    pond: Pond, who: str
) -> None:
    async with listening() as sink, closed_door() as door, two(pond) as processes:
        await limit(pond.db, "provider:sink", 0)
        runs = await all_in_line(pond, sink, door)
        async with pond.engine_db.duty("test") as con:
            pids = await con.fetch(
                "select distinct w.pid from worker w join lease l on l.worker_id = w.worker_id"
            )
        waiting = {row["pid"] for row in pids}
        victims = [one for one in processes if (one.pid in waiting) == (who != "the other")]
        for victim in victims:
            victim.kill()
            await victim.wait()
        if len(victims) == len(processes):
            processes.append(await begin(pond, slots=12))
        await limit(pond.db, "provider:sink", 1)
        door.open()
        for run_id in runs:
            assert (await pond.ended(run_id))["outcome"] == "succeeded"
        assert sorted(sink.names) == ["a", "b", *LATER]
        assert sink.most == 1
        await nothing_left(pond)
