"""A flood: orgs with a constant backlog, workers of the real command line that are killed and stopped, limits that are
edited, and a stand-in for the provider that counts what arrives.

Used by test_flood.py. Invariant: whether limits held is decided by what the stand-in counted and when edits were sent
and answered, never by what the engine says of itself.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import orjson
import psutil
from tests.cli.conftest import ROOT, clean_environment
from tests.engine.conftest import Pond
from tests.engine.test_limits import limit, second_org, submit_many
from tests.soak import flood_flows
from tests.soak.ledger import (
    Allowance,
    Edit,
    most_in_flight_over,
    most_over,
    times_full,
    used,
)

from millpond.types import NO_ORG

LEASE_S = 3.0
WORKERS, SLOTS = 3, 16
# A stop is at times shorter and at times longer than a lease.
STOP_S = (0.2, 5.0)
PAUSE_S = (1.0, 3.5)
EDIT_S = 6.0
# How long calls take: the longest is shorter than the shortest time in which a silent worker's lease ends.
SHORT_S, LONG_S = (0.01, 0.05), (0.2, 0.8)
BACKLOG = 40
BURST, OWN_BURST = 15, 3
# The first burst is no part of what a rate allows later on.
WARM_S = 3.0
PROVIDER, MODEL = "provider:one", "model:fast"
FLOWS = {
    flood_flows.ask.name: (flood_flows.ask, LONG_S),
    flood_flows.quick.name: (flood_flows.quick, SHORT_S),
    flood_flows.both.name: (flood_flows.both, SHORT_S),
}


@dataclass
class Report:
    """What a flood came to. What is `over` is in calls: 0 or less where a limit held."""

    over: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    aborted: int = 0
    used: dict[str, float] = field(default_factory=dict)
    full: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    toll: Counter[str] = field(default_factory=Counter)
    length_s: float = 0.0

    def lines(self) -> list[str]:
        """Return it as lines of text."""
        over = ", ".join(f"{key} {most:+.1f}" for key, most in self.over.items())
        uses = ", ".join(f"{key} {share:.1%}" for key, share in self.used.items())
        return [
            f"{self.length_s:.0f} s, {dict(self.toll)}, runs {dict(self.outcomes)}",
            f"calls {self.calls}, broken off by deaths {self.aborted}",
            f"most over a limit, in calls: {over}",
            f"used of rates: {uses}; last place of {PROVIDER} filled by {self.full:.1%} of its calls",
        ]


class Flood:
    """One database, a stand-in, three workers, and what happens to them."""

    def __init__(self, pond: Pond, folder: Path) -> None:
        self._pond = pond
        self._folder = folder
        self._orgs = [pond.org_id]
        self._port = 0
        self._workers: list[subprocess.Popen[bytes]] = []
        self._edits: defaultdict[str, list[Edit]] = defaultdict(list)
        self.report = Report()

    async def run(self, length_s: float) -> Report:
        """Let it flood for a while; returns what came of it."""
        self._orgs += [await second_org(self._pond.db) for _ in range(3)]
        async with AsyncExitStack() as stack:
            self._port = await stack.enter_async_context(standin())
            stack.callback(self._kill_all)
            await self._limit()
            await self._fill_up()
            for _ in range(WORKERS):
                self._start()
            await self._all_there()
            begin_s = time.monotonic() + WARM_S
            until_s = time.monotonic() + length_s
            async with asyncio.TaskGroup() as group:
                for go_on in (self._fill, self._hurt, self._edit):
                    group.create_task(go_on(until_s))
            # What a stopped one did not see: nobody is to be over afterwards either.
            end_s = time.monotonic()
            await asyncio.sleep(LONG_S[1])
            record = await self._record()
            gone = [one.poll() for one in self._workers if one.poll() is not None]
            assert not gone, f"workers ended by themselves: {gone}: {self._log()}"
        self._judge(record, begin_s, end_s)
        await self._count()
        return self.report

    # What may go

    async def _limit(self) -> None:
        await self._concurrency(PROVIDER, 8)
        await self._rate(MODEL, 30.0)
        db, own = self._pond.db, self._orgs[0]
        await limit(db, f"org:* x {PROVIDER}", 4)
        await limit(db, "org:pond", 5, org_id=own)
        await limit(db, MODEL, 40, org_id=own, kind="rate", period_s=10.0, burst=OWN_BURST)

    async def _concurrency(self, key: str, value: float) -> None:
        await self._set(key, value, lambda: limit(self._pond.db, key, int(value), org_id=NO_ORG))

    async def _rate(self, key: str, value: float) -> None:
        def put() -> Awaitable[None]:
            many = round(10 * value)
            return limit(self._pond.db, key, many, kind="rate", period_s=10.0, burst=BURST)

        await self._set(key, value, put)

    async def _set(self, key: str, value: float, put: Callable[[], Awaitable[None]]) -> None:
        sent_s = time.monotonic()
        await put()
        self._edits[key].append(Edit(sent_s=sent_s, done_s=time.monotonic(), value=value))

    async def _edit(self, until_s: float) -> None:
        """Raise and lower the two limits that all share, in turn."""
        places, rates = cycle([5.0, 10.0, 8.0]), cycle([20.0, 40.0, 30.0])
        while time.monotonic() + EDIT_S < until_s:
            await asyncio.sleep(EDIT_S)
            await self._concurrency(PROVIDER, next(places))
            await self._rate(MODEL, next(rates))
            self.report.toll["edits"] += 2

    # What goes

    async def _fill(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self._fill_up()
            await asyncio.sleep(0.2)

    async def _fill_up(self) -> None:
        """Let as many runs of each org and flow be there as always."""
        async with self._pond.engine_db.duty("test") as con:
            rows = await con.fetch(
                "select i.org_id, rtrim(l.capability, '!') as able, count(*)::int as n from item i"
                " join lane l on l.org_id = i.org_id and l.lane_id = i.lane_id group by 1, 2"
            )
        there = {(row["org_id"], row["able"].rsplit("@", 1)[0]): row["n"] for row in rows}
        for org_id in self._orgs:
            for name, (flow, for_s) in FLOWS.items():
                if (missing := BACKLOG - there.get((org_id, name), 0)) > 0:
                    data = {"port": self._port, "for_s": random.uniform(*for_s)}
                    await submit_many(self._pond, flow, missing, data, org_id=org_id)
                    self.report.toll["submitted"] += missing

    # What happens to workers

    def _start(self) -> None:
        environment = clean_environment(
            MILLPOND_DATABASE_URL=self._pond.urls.app,
            MILLPOND_ENGINE_DATABASE_URL=self._pond.urls.engine,
            MILLPOND_EMBEDDER="openai:unused",
            MILLPOND_LEASE_S=str(LEASE_S),
            MILLPOND_DATA_DIR=str(self._folder),
            MILLPOND_LOG_LEVEL="warning",
        )
        command = [sys.executable, "-m", "millpond.cli", "worker"]
        command += ["--flows", flood_flows.__name__, "--queues", f"default:{SLOTS}"]
        with (self._folder / "workers.log").open("ab") as log:
            self._workers.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            )

    async def _all_there(self) -> None:
        until_s = time.monotonic() + 60
        while await self._pond.count("worker", "expires_at > clock_timestamp()") < WORKERS:
            ended = [one.poll() for one in self._workers]
            assert time.monotonic() < until_s, f"not all are there, ended: {ended}: {self._log()}"
            await asyncio.sleep(0.05)

    async def _hurt(self, until_s: float) -> None:
        """Kill and stop workers in turn, whichever comes; nobody is left stopped."""
        for hurt in cycle([self._kill, self._stop]):
            await asyncio.sleep(random.uniform(*PAUSE_S))
            if time.monotonic() >= until_s:
                return
            await hurt()

    async def _kill(self) -> None:
        worker = self._workers.pop(random.randrange(len(self._workers)))
        worker.kill()
        await asyncio.to_thread(worker.wait)
        self.report.toll["kills"] += 1
        self._start()

    async def _stop(self) -> None:
        worker = random.choice(self._workers)
        worker.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(random.uniform(*STOP_S))
        finally:
            worker.send_signal(signal.SIGCONT)
        self.report.toll["stops"] += 1

    def _kill_all(self) -> None:
        below = [
            child
            for one in self._workers
            if one.poll() is None
            for child in psutil.Process(one.pid).children(recursive=True)
        ]
        for worker in self._workers:
            worker.kill()
            worker.wait()
        for child in below:
            child.kill()
        psutil.wait_procs(below, timeout=30)

    def _log(self) -> str:
        return (self._folder / "workers.log").read_text()[-4000:]

    # What came of it

    async def _record(self) -> dict[str, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"GET /record HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        record: dict[str, Any] = orjson.loads(body)
        return record

    def _judge(self, record: dict[str, Any], begin_s: float, end_s: float) -> None:
        report, grace_s = self.report, STOP_S[1] + LONG_S[1] + 1.0
        report.length_s = end_s - begin_s + WARM_S
        report.calls = {key: len(record[key]["at_s"]) for key in (PROVIDER, MODEL)}
        report.aborted = sum(record[key]["aborted"] for key in (PROVIDER, MODEL))

        def judge_places(key: str, edits: list[Edit]) -> None:
            one = record[key]
            report.over[key] = most_in_flight_over(
                one["at_s"], one["in_flight"], edits, grace_s=grace_s
            )

        def judge_rate(key: str, edits: list[Edit], burst: int) -> None:
            allowance, at_s = Allowance(edits, burst), record[key]["at_s"]
            report.over[key] = most_over(at_s, allowance)
            report.used[key] = used(at_s, allowance, begin_s, end_s)

        judge_places(PROVIDER, self._edits[PROVIDER])
        provider = record[PROVIDER]
        report.full = times_full(
            provider["at_s"], provider["in_flight"], self._edits[PROVIDER], begin_s
        )
        for org_id in self._orgs:
            judge_places(f"org:{org_id} x {PROVIDER}", _always(4))
        judge_places(f"org:{self._orgs[0]}", _always(5))
        judge_rate(MODEL, self._edits[MODEL], BURST)
        judge_rate(f"org:{self._orgs[0]} x {MODEL}", _always(4.0), OWN_BURST)

    async def _count(self) -> None:
        async with self._pond.engine_db.duty("test") as con:
            rows = await con.fetch(
                "select coalesce(outcome, 'unfinished') as outcome, count(*)::int as n from run group by 1"
            )
            late = await con.fetchval(
                "select count(*)::int from event where kind = 'run.released' and data->>'reason' = 'late'"
            )
        self.report.outcomes.update({row["outcome"]: row["n"] for row in rows})
        self.report.toll["late"] = late


def _always(value: float) -> list[Edit]:
    return [Edit(sent_s=0.0, done_s=0.0, value=value)]


@asynccontextmanager
async def standin() -> AsyncIterator[int]:
    """Run a stand-in until the block ends; gives its port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.soak.standin",
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        yield int(await process.stdout.readline())
    finally:
        process.kill()
        await process.wait()
