"""How writes of many runs are put together for one commit."""

from __future__ import annotations

import asyncio

import pytest

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


def written(*sizes: int, last: int | None = None) -> Batch:
    """Make a batch of results of so many bytes, each of a run of its own; with `last` one of ends that have one."""
    loop = asyncio.get_running_loop()
    steps: list[Pending[StepWrite]] = []
    ends: list[Pending[FinishWrite]] = []
    for size in sizes:
        run_id = new_id()
        lease = Lease(1, run_id, run_id, 1, new_id())
        step = StepWrite(
            lease=lease,
            step_key="s:0",
            name="s",
            event_kind="step.succeeded",
            event_data="x" * size,
        )
        if last is None:
            steps.append(Pending(step, loop.create_future()))
        else:
            step = step._replace(event_data="x" * last)
            end = FinishWrite(
                lease=lease, outcome="succeeded", event_data="x" * (size - last), last=step
            )
            ends.append(Pending(end, loop.create_future()))
    return Batch(steps, ends)


@pytest.mark.parametrize("last", [None, 2])
async def test_a_batch_is_cut_where_the_next_write_would_be_one_or_a_byte_too_many(
    last: int | None,
) -> None:
    half = MAX_BYTES // 2
    for sizes, first in (
        ([9] * MAX_WRITES, MAX_WRITES),
        ([9] * (MAX_WRITES + 1), MAX_WRITES),
        ([9] * (3 * MAX_WRITES), MAX_WRITES),
        ([half, half], 2),
        ([half, half + 1], 1),
        ([MAX_BYTES + 1, 9], 1),
        ([*[9] * MAX_WRITES, MAX_BYTES], MAX_WRITES),
        ([*[9] * (MAX_WRITES - 1), MAX_BYTES], MAX_WRITES - 1),
    ):
        batch = written(*sizes, last=last)
        head, rest = batch.split()
        assert (len(head), len(rest)) == (first, len(sizes) - first)
        assert [*head.steps, *rest.steps] == batch.steps
        assert [*head.ends, *rest.ends] == batch.ends
