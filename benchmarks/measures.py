"""What is measured of Millpond: submit, bulk submit, drain, three steps, idle dispatch, a steady drain.

Called by `quick`, by `driver` beside the peers' drivers, and by the suites. Invariant: one worker in
this process, with its heartbeat beside it; the clock runs from the first run that starts to the last
that is committed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import asyncpg

from benchmarks.flows import SEEN, mark, noop, three
from benchmarks.ground import PAYLOAD, Ground
from millpond.engine.registry import Flow
from millpond.engine.submit import submit, submit_alone
from millpond.types import Intent

SLOTS = 200
# Beside peers: so many no-op runs at once, and of three steps. Theirs are in their drivers.
DRAIN_SLOTS, STEPS_SLOTS = 1000, 800
SETTLED_S = 1.5
PAUSE_S = 0.02
_DISPATCH_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Submits:
    """Seconds of each submit, and of the two yardsticks measured in between, the same number of times."""

    took: list[float]
    commits: list[float]
    transactions: list[float]


async def submit_one_by_one(at: Ground, *, count: int) -> Submits:
    """Submit one run at a time, each in a transaction of its own."""
    org_id = await at.org()
    found = Submits(took=[], commits=[], transactions=[])

    async def one_run() -> None:
        await submit_alone(at.db, [at.intent(noop, org_id)])

    async with yardsticks(at.urls.owner) as (commit, transaction):
        await one_run()
        for _ in range(count):
            found.took.append(await timed(one_run))
            found.commits.append(await timed(commit))
            found.transactions.append(await timed(transaction))
    await at.clear([noop], SLOTS)
    return found


async def timed(call: Callable[[], Awaitable[object]]) -> float:
    """Return the seconds that one call takes."""
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


Call: TypeAlias = Callable[[], Awaitable[None]]


@asynccontextmanager
async def yardsticks(url: str) -> AsyncIterator[tuple[Call, Call]]:
    """Lend what a submit is measured against: the payload inserted as one row and committed.

    The first does so in one message, the second as begin, insert and commit.
    """
    con = await asyncpg.connect(url)
    try:
        await con.execute(
            "create table if not exists public.bare "
            "(id bigint generated always as identity primary key, data text)"
        )
        insert = await con.prepare("insert into public.bare (data) values ($1)")
        data = PAYLOAD.decode()

        async def commit() -> None:
            await insert.fetch(data)

        async def transaction() -> None:
            await con.execute("begin")
            await insert.fetch(data)
            await con.execute("commit")

        await commit()
        yield commit, transaction
    finally:
        await con.close()


async def bulk(at: Ground, *, count: int) -> float:
    """Return the seconds in which `count` runs are submitted, 1,000 in each transaction."""
    org_id = await at.org()
    began = time.perf_counter()
    for start in range(0, count, 1000):
        batch = [at.intent(noop, org_id) for _ in range(min(1000, count - start))]
        async with at.db.org(org_id) as con:
            await submit(con, batch)
    took_s = time.perf_counter() - began
    await at.clear([noop], SLOTS)
    return took_s


async def drain(
    at: Ground,
    flow: Flow,
    *,
    count: int,
    orgs: int = 1,
    change: Callable[[Intent, int], Intent] = lambda intent, _: intent,
    also: Sequence[Flow] = (),
    slots: int = SLOTS,
) -> float:
    """Return runs per second for `count` runs that wait when the worker starts.

    The worker has the flows `also` beside theirs.
    """
    await at.fill(flow, await at.orgs(orgs), count, change)
    return await drain_filled(at, [flow, *also], count=count, slots=slots)


async def drain_filled(
    at: Ground,
    flows: Sequence[Flow],
    *,
    count: int,
    org_id: int | None = None,
    slots: int = SLOTS,
) -> float:
    """Return runs per second from the first start until the `count` waiting runs have ended.

    With an org others may have runs that do not end.
    """
    SEEN.forget()
    async with at.worker(flows, slots):
        while SEEN.starts < count or await at.left(org_id):
            await asyncio.sleep(0.005)
        return count / (time.perf_counter() - SEEN.began)


async def three_steps(at: Ground, *, count: int) -> float:
    """Return three-step runs per second."""
    return await drain(at, three, count=count)


async def idle_dispatch(at: Ground, *, count: int) -> list[float]:
    """Return the seconds from before each submit to the first line of flow code, the worker idle."""
    org_id = await at.org()
    took = []
    async with at.worker([mark], SLOTS), at.hints() as hints:
        await asyncio.sleep(SETTLED_S)
        for _ in range(count):
            intent = at.intent(mark, org_id)
            started: asyncio.Future[float] = asyncio.get_running_loop().create_future()
            SEEN.marks[str(intent.run_id)] = started
            began = time.perf_counter()
            await submit_alone(at.db, [intent])
            hints.wake([intent.queue])
            async with asyncio.timeout(_DISPATCH_S):
                took.append(await started - began)
            await asyncio.sleep(PAUSE_S)
    return took
