"""Limits on tokens over worker processes, some of them killed: a provider on a socket counts what it gives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import pytest
from tests.engine.conftest import Pond
from tests.engine.test_limits import limit, over
from tests.engine.test_limits_processes import begin, processes_of
from tests.engine.tokens_process import NEED, asks, steps_ask

from millpond.engine.registry import Flow

SLOTS = 6
PROCESS = "tests.engine.tokens_process"
RATE, BURST, MOST_USED = 1500, 600, 180


@dataclass
class Counter:
    """The far end: gives tokens, and counts them by the time at which it does, whether anybody hears of it or not."""

    port: int = 0
    given: list[tuple[float, int]] = field(default_factory=list)
    unheard: int = 0
    now: int = 0
    random: Random = field(default_factory=lambda: Random(7))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Give tokens at once, and say so after a while; the other end may be gone by then."""
        used = self.random.choice([20, 60, 95, 100, 130, MOST_USED])
        self.given.append((time.monotonic(), used))
        self.now += 1
        gone = asyncio.create_task(reader.read())
        try:
            done, _ = await asyncio.wait([gone], timeout=self.random.uniform(0.02, 0.2))
            if done:
                self.unheard += used
                return
            writer.write(b"%d\n" % used)
            await writer.drain()
            await gone
        except ConnectionError:
            self.unheard += used
        finally:
            self.now -= 1
            writer.close()

    async def busy(self) -> None:
        """Wait until somebody asks."""
        async with asyncio.timeout(20):
            while not self.now:
                await asyncio.sleep(0.002)

    def most_beyond(self, rate: float, burst: int) -> float:
        """Return by how much the fullest window was above what rate and burst allow."""
        worst = float("-inf")
        for nth, (start, _) in enumerate(self.given):
            total = 0
            for at, used in self.given[nth:]:
                total += used
                worst = max(worst, total - burst - rate * (at - start))
        return worst


@asynccontextmanager
async def counting() -> AsyncIterator[Counter]:
    counter = Counter()
    server = await asyncio.start_server(counter.serve, "127.0.0.1", 0)
    counter.port = server.sockets[0].getsockname()[1]
    try:
        yield counter
    finally:
        server.close()


async def told(pond: Pond) -> int:
    """Return how many tokens are counted as used."""
    async with pond.engine_db.duty("test") as con:
        total: int = await con.fetchval(
            "select coalesce((select sum(t) from usage_part p, unnest(p.input_tokens) t), 0)"
            " + coalesce((select sum(input_tokens) from usage_day), 0)"
        )
    return int(total)


@pytest.mark.parametrize("flow", [asks, steps_ask], ids=["run", "step"])
async def test_a_providers_count_and_ours_agree_within_the_debt_over_processes_and_kills(
    pond: Pond, flow: Flow
) -> None:
    async with counting() as counter:
        await limit(pond.db, "provider:counter", RATE, kind="tokens", period_s=1.0, burst=BURST)
        for _ in range(90):
            await pond.submit(flow, {"port": counter.port})
        began = time.monotonic()
        async with processes_of(pond, 2, PROCESS, SLOTS) as workers:
            for nth in (0, 1):
                await asyncio.sleep(0.8)
                await counter.busy()
                workers[nth].kill()
                await workers[nth].wait()
                workers[nth] = await begin(pond, PROCESS, SLOTS)
            await over(pond, flow, 90, within_s=60.0)
        took_s = time.monotonic() - began
    total = sum(used for _, used in counter.given)
    # Two workers at a time, and those that a killed one had reserved.
    assert counter.most_beyond(RATE, BURST) <= 2 * SLOTS * max(NEED, MOST_USED)
    assert total <= RATE * took_s + BURST
    # What was told is what was given, but for the calls of killed workers.
    assert total - counter.unheard <= await told(pond) + 2 * SLOTS * MOST_USED
    assert await told(pond) <= total
    assert counter.unheard <= 2 * SLOTS * MOST_USED
