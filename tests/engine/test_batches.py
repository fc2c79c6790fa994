"""How writes of many runs are put together for one commit."""

from __future__ import annotations

import asyncio

from millpond.engine.batches import MAX_BYTES, MAX_WRITES, Batch, FinishWrite, Pending, StepWrite
from millpond.engine.leases import Lease
from millpond.types import new_id


async def pending(step_bytes: int, steps: int) -> Batch:
    """Make a batch of one run: steps of a size, then its end."""
    run_id, loop = new_id(), asyncio.get_running_loop()
    lease = Lease(1, run_id, run_id, 1, new_id())
    writes = [
        StepWrite(
            lease=lease,
            step_key=f"s:{nth}",
            name="s",
            event_kind="progress",
            event_data="x" * step_bytes,
        )
        for nth in range(steps)
    ]
    end = FinishWrite(lease=lease, outcome="succeeded", event_data="{}")
    return Batch(
        [Pending(write, loop.create_future()) for write in writes],
        [Pending(end, loop.create_future())],
    )


async def test_an_end_waits_for_the_steps_that_the_batch_had_no_room_for() -> None:
    for batch in (await pending(MAX_BYTES // 2 + 1, 3), await pending(1, MAX_WRITES + 1)):
        first, rest = batch.split()
        assert len(rest.steps) > 0
        assert (len(first.ends), len(rest.ends)) == (0, 1)


async def test_an_end_goes_with_its_steps_where_there_is_room() -> None:
    first, rest = (await pending(1, 3)).split()
    assert (len(first), len(rest)) == (4, 0)
