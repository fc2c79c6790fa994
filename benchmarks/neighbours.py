"""Neighbours: orgs that share a queue's slots, what each run waited for and what each org got of them.

Called by `driver` beside the peers' drivers, and by the suite `noisy`. Invariants: runs are submitted at set
times, whatever became of those before; a wait goes from before the submit to the first line of flow code; an
org's worker time is that in which its flow code ran.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import orjson

from benchmarks.flows import SEEN, Nap, nap
from benchmarks.ground import PAYLOAD, Ground
from benchmarks.peers.wire import EVERY_S, NAP_S, SHARED_SLOTS, visits
from millpond.engine.hints import Hints
from millpond.engine.registry import Flow
from millpond.engine.submit import submit_alone
from millpond.types import Intent, Json


@dataclass(frozen=True)
class Visit:
    """A run of an org's `nap` that is submitted a set time after the visits began."""

    after_s: float
    org_id: int


@dataclass
class Shared:
    """What a drain of shared slots came to: the runs that rested, and when each visit was sent."""

    naps: list[Nap]
    sent: dict[uuid.UUID, float] = field(default_factory=dict)

    def waits(self) -> list[float]:
        """Return the seconds that each visit waited."""
        return [one.began - self.sent[one.run_id] for one in self.naps if one.run_id in self.sent]

    def span(self, org_id: int) -> float:
        """Return the seconds from the first start to the last end of an org's runs."""
        mine = [one for one in self.naps if one.org_id == org_id]
        return max(one.ended for one in mine) - min(one.began for one in mine)


def resting(draw: Callable[[int], float]) -> Callable[[Intent, int], Intent]:
    """Give the n-th run of an org the rest that is drawn for it."""
    return lambda intent, nth: replace(intent, input=_input(draw(nth)))


def always(rest_s: float) -> Callable[[Intent, int], Intent]:
    """Give every run the same rest."""
    return resting(lambda _: rest_s)


def _input(rest_s: float) -> bytes:
    """Return an input as long as everybody's payload."""
    rest_s = round(rest_s, 6)
    bare = len(orjson.dumps({"rest_s": rest_s, "text": ""}))
    return orjson.dumps({"rest_s": rest_s, "text": "x" * (len(PAYLOAD) - bare)})


async def noisy(at: Ground, *, count: int) -> dict[str, Json]:
    """Drain what A has queued, with B coming by and without, after a small one to warm up."""
    warm, beside, alone = await at.orgs(3)
    guest = await at.org()
    await share(at, warm, max(1, count // 10), [])
    coming = [Visit(n * EVERY_S, guest) for n in range(visits(count))]
    with_b = await share(at, beside, count, coming)
    without = await share(at, alone, count, [])
    return {
        "took_s": with_b.waits(),
        "beside_s": with_b.span(beside),
        "alone_s": without.span(alone),
    }


async def share(at: Ground, host: int, count: int, coming: Sequence[Visit]) -> Shared:
    """Drain `count` short runs of one org, with visits of others from its first end on."""
    await at.fill(nap, [host], count, always(NAP_S))
    async with sharing(at, [nap]) as hints:
        while not SEEN.naps:
            await asyncio.sleep(0.001)
        sent = await come(at, hints, coming)
        while len(SEEN.naps) < count + len(coming):
            await asyncio.sleep(0.005)
    return Shared(list(SEEN.naps), sent)


@asynccontextmanager
async def sharing(at: Ground, flows: Sequence[Flow]) -> AsyncIterator[Hints]:
    """Run a worker with the slots that orgs share; gives what hints are sent by."""
    SEEN.forget()
    async with at.worker(flows, SHARED_SLOTS), at.hints() as hints:
        yield hints


async def come(at: Ground, hints: Hints, coming: Iterable[Visit]) -> dict[uuid.UUID, float]:
    """Submit each visit when its time has come; returns when each was sent, by run."""
    sent: dict[uuid.UUID, float] = {}

    async def one(intent: Intent) -> None:
        sent[intent.run_id] = time.perf_counter()
        await submit_alone(at.db, [intent])
        hints.wake([intent.queue])

    start, data = time.perf_counter(), _input(NAP_S)
    async with asyncio.TaskGroup() as group:
        for visit in sorted(coming, key=lambda visit: visit.after_s):
            await asyncio.sleep(max(0.0, start + visit.after_s - time.perf_counter()))
            group.create_task(one(at.intent(nap, visit.org_id, data)))
    return sent


def worker_seconds(naps: Iterable[Nap], start: float, end: float) -> dict[int, float]:
    """Return the worker time of each org between two times."""
    used: dict[int, float] = {}
    for one in naps:
        inside = min(one.ended, end) - max(one.began, start)
        used[one.org_id] = used.get(one.org_id, 0.0) + max(0.0, inside)
    return used


def jain(shares: Mapping[int, float]) -> float:
    """Return Jain's index of shares: 1 when all are the same, 1/n when one has everything."""
    values = shares.values()
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))
