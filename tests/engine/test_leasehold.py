"""A worker that was stopped or starved calls nobody until it knows that its leases still stand."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from tests.engine.conftest import Pond

from millpond.cli.signals import on_continue
from millpond.engine.context import Context
from millpond.engine.heartbeat import Pulse
from millpond.engine.leasehold import Leasehold, cut_connections
from millpond.engine.worker import Worker
from millpond.errors import LeaseLost

LEASE_S = 30.0


@contextmanager
def pulse_by_hand(worker: Worker) -> Iterator[Pulse]:
    """Stop the worker's heartbeat, so that what it last told is what a test tells in its place."""
    beats = [
        one
        for one in psutil.Process().children()
        if "millpond.engine.heartbeat" in " ".join(one.cmdline())
    ]
    for one in beats:
        one.suspend()
    pulse = worker._leasehold._pulse
    assert beats
    assert pulse is not None
    try:
        yield pulse
    finally:
        for one in beats:
            one.resume()


async def test_no_step_begins_while_leases_may_be_somebody_elses(pond: Pond) -> None:
    waits, goes, began = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def call() -> None:
        began.set()

    async def work(ctx: Context, _: None) -> None:
        waits.set()
        await goes.wait()
        await ctx.step("call", call)

    pond.flow(work)
    async with pond.worker(lease_s=LEASE_S) as worker:
        run_id = await pond.submit("work")
        await waits.wait()
        with pulse_by_hand(worker) as pulse:
            pulse.renew(time.monotonic() - 1)
            goes.set()
            for _ in range(20):
                await asyncio.sleep(0.01)
            assert not began.is_set()
            pulse.renew(time.monotonic() + LEASE_S)
            row = await pond.ended(run_id)
    assert (row["outcome"], row["attempts"]) == ("succeeded", 1)


async def test_a_worker_that_goes_on_without_its_leases_ends_its_work_first_of_all(
    pond: Pond,
) -> None:
    """As when a provider's connection is open just as the stopped process goes on: no request leaves on it."""
    waits, connected = asyncio.Event(), asyncio.Event()
    sent: list[int] = []

    async def work(ctx: Context, _: None) -> None:
        async def call() -> None:
            waits.set()
            await connected.wait()
            sent.append(ctx.attempt)

        await ctx.step("call", call)

    pond.flow(work)
    async with pond.worker() as worker:
        run_id = await pond.submit("work")
        await waits.wait()
        first = worker.worker_id
        with pulse_by_hand(worker) as pulse:
            pulse.lose()
            worker.go_on()
            connected.set()
        await pond.ended(run_id)
        assert worker.worker_id != first
    assert sent == [2]


async def test_a_worker_that_goes_on_with_its_leases_works_on(pond: Pond) -> None:
    waits, connected = asyncio.Event(), asyncio.Event()

    async def work(ctx: Context, _: None) -> None:
        async def call() -> None:
            waits.set()
            await connected.wait()

        await ctx.step("call", call)

    pond.flow(work)
    async with pond.worker(lease_s=LEASE_S) as worker:
        run_id = await pond.submit("work")
        await waits.wait()
        worker.go_on()
        connected.set()
        row = await pond.ended(run_id)
    assert (row["outcome"], row["attempts"]) == ("succeeded", 1)


@pytest.mark.parametrize("stand", [True, False])
def test_whoever_holds_still_does_so_until_it_knows(stand: bool) -> None:
    pulse = Pulse.make()
    try:
        pulse.renew(time.monotonic() - 1)
        leasehold = Leasehold(pulse)
        tell = (lambda: pulse.renew(time.monotonic() + 60)) if stand else pulse.lose
        threading.Timer(0.05, tell).start()
        leasehold.hold(30.0)
        assert (leasehold.is_sure, leasehold.is_gone) == (stand, not stand)
    finally:
        pulse.close()
    assert leasehold.is_gone, "a session that is over has no leases"


async def test_who_waits_for_leases_that_are_gone_is_told(pond: Pond) -> None:
    pulse = Pulse.make()
    try:
        waiting = asyncio.create_task(Leasehold(pulse).until_sure())
        await asyncio.sleep(0)
        pulse.lose()
        with pytest.raises(LeaseLost):
            await waiting
        await Leasehold().until_sure()
    finally:
        pulse.close()


async def test_what_is_written_and_not_yet_sent_does_not_leave_when_connections_are_cut() -> None:
    arrived: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.set_result(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    cut_connections()
    writer.write(b"POST")
    assert await arrived == b""
    writer.close()
    server.close()


def test_a_process_that_goes_on_hears_of_it_before_the_next_line() -> None:
    heard: list[bool] = []
    before = signal.getsignal(signal.SIGCONT)
    with on_continue(lambda: heard.append(True)):
        os.kill(os.getpid(), signal.SIGCONT)
        assert heard == [True]
    assert signal.getsignal(signal.SIGCONT) == before
