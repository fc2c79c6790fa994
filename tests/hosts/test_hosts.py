"""Several hosts share one database and nothing else: who is who, whose clock counts, and a host that is cut off."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import orjson
import pytest
from tests.cli.test_processes import outcome, start
from tests.hosts.conftest import Site
from tests.hosts.machines import UPTIME_S, Host

from millpond.db.pool import Database
from millpond.identity.permissions import PERMISSIONS
from millpond.identity.ring import KeyRing
from millpond.identity.seal import Seal
from millpond.identity.tokens import Keyring
from millpond.types import Principal

pytestmark = pytest.mark.slow
DEADLINE_S = 60.0
# Far more than any lease, timer or token of a test lasts.
AHEAD_S = 7200
PYTHON = [sys.executable, "-m", "millpond.cli"]
WORKERS = "select host, pid, worker_id from worker where expires_at > clock_timestamp()"


async def until(what: str, holds: Callable[[], Awaitable[Any]]) -> Any:
    """Wait until `holds` gives something true, and return it."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if found := await holds():
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {DEADLINE_S:.0f} s: {what}")


def work(site: Site, host: Host, slots: int = 10) -> None:
    """Start a worker on a host."""
    host.start([*PYTHON, "worker", "--queues", f"default:{slots}"], site.environment(host))


async def live(db: Database) -> dict[str, tuple[int, uuid.UUID]]:
    """Return pid and id of each host's live worker; there is one on each at most."""
    async with db.globals() as con:
        rows = await con.fetch(WORKERS)
    assert len({row["host"] for row in rows}) == len(rows)
    return {row["host"]: (row["pid"], row["worker_id"]) for row in rows}


async def both_at_work(db: Database, site: Site) -> dict[str, tuple[int, uuid.UUID]]:
    """Start a worker on each host; returns who they are."""
    for host in site.hosts:
        work(site, host)

    async def both() -> dict[str, tuple[int, uuid.UUID]] | None:
        found = await live(db)
        return found if len(found) == 2 else None

    found: dict[str, tuple[int, uuid.UUID]] = await until("two workers are there", both)
    return found


def told(host: Host) -> list[float]:
    """Ask a host for its uptime and the time of day."""
    asks = "import time; print(time.monotonic(), time.time())"
    said, _ = host.start([sys.executable, "-c", asks], {}).communicate()
    return [float(word) for word in said.split()]


async def output(db: Database, org: int, run_id: uuid.UUID) -> Any:
    """Wait for the end of a run and return its output."""
    assert await until(f"{run_id} ends", lambda: outcome(db, org, run_id)) == "succeeded"
    async with db.org(org) as con:
        return orjson.loads(await con.fetchval("select output from run where run_id = $1", run_id))


async def record(con: asyncpg.Connection[Any], run_id: uuid.UUID) -> list[list[str]]:
    """Read all that is stored of a run."""
    stored = []
    for table in ("run", "step", "event", "lease", "item"):
        sql = f"select * from millpond.{table} where run_id = $1 order by 1, 2, 3"
        stored.append([str(tuple(row)) for row in await con.fetch(sql, run_id)])
    return stored


async def test_hosts_share_work_whatever_their_pids_and_clocks(
    site: Site, db: Database, org: int
) -> None:
    site.hosts[1].set_ahead(AHEAD_S)
    workers = await both_at_work(db, site)
    assert {host.name for host in site.hosts} == set(workers)
    assert len({pid for pid, _ in workers.values()}) == 1, "the same pid on both hosts"
    first, second = [told(host) for host in site.hosts]
    assert second[0] - first[0] > UPTIME_S / 2
    if site.hosts[1].clock:
        assert second[1] - first[1] > AHEAD_S / 2
    runs = [await start(db, org, "hosts.quick", n) for n in range(60)]
    by = {name for run_id in runs for name in await output(db, org, run_id)}
    assert by == set(workers), "both have worked"
    async with db.org(org) as con:
        deaths = await con.fetchval("select count(*) from event where kind = 'run.rescued'")
    assert deaths == 0, "neither took the other for dead"


async def test_an_api_on_one_host_serves_callers_on_another(
    site: Site, db: Database, org: int
) -> None:
    first, second = site.hosts
    await both_at_work(db, site)
    first.start(
        [*PYTHON, "api", "--host", first.address, "--port", "8080"], site.environment(first)
    )
    keyring = await Keyring.open(db, KeyRing(Seal(site.key)))
    principal = Principal(
        org_id=org,
        subject="user:ann",
        permissions=frozenset(PERMISSIONS),
        roles=frozenset({"support"}),
    )
    call = second.start(
        [sys.executable, "-c", _CALLS, f"http://{first.address}:8080", keyring.mint(principal, "pond", 600)],
        {},
    )  # fmt: skip
    said, _ = await asyncio.to_thread(call.communicate)
    assert call.returncode == 0, second.said()
    assert set(orjson.loads(said)) <= {host.name for host in site.hosts}


async def test_a_host_that_was_cut_off_writes_nothing_when_it_comes_back(
    site: Site, db: Database, org: int
) -> None:
    lost, other = site.hosts
    work(site, lost)
    before = (await until("a worker is there", lambda: live(db)))[lost.name]
    run_id = await start(db, org, "hosts.held", 0)
    seen = "/tmp/seen"

    async def reached(host: Host = lost) -> bool:
        return host.path(seen).exists()

    await until("the lost host is in the step", reached)
    work(site, other)

    async def both() -> bool:
        return len(await live(db)) == 2

    await until("the other host is at work", both)
    more = [await start(db, org, "hosts.quick", n) for n in range(40)]
    lost.cut_off()
    await until("the other host has taken the run over", lambda: reached(other))
    other.path("/tmp/gate").touch()
    assert await output(db, org, run_id) == other.name
    con = await asyncpg.connect(site.url("boss"))
    for one in more:
        await output(db, org, one)
    ended = await record(con, run_id)
    assert any("run.rescued" in event for event in ended[2])

    lost.path("/tmp/gate").touch()  # its step ends now, and its result has nowhere to go
    await asyncio.sleep(0.5)
    lost.connect()

    async def again() -> bool:
        found = await live(db)
        return lost.name in found and found[lost.name][1] != before[1]

    await until("the lost host works again", again)
    for child in other.processes():
        child.kill()
    last = await start(db, org, "hosts.quick", 0)
    assert lost.name in await output(db, org, last), "it has had its say since"
    assert await record(con, run_id) == ended
    assert (
        await con.fetchval(
            "select count(*) from millpond.run where outcome is null or outcome <> 'succeeded'"
        )
        == 0
    )
    await con.close()


async def test_a_session_of_a_host_that_is_gone_ends_with_its_locks(site: Site) -> None:
    """Its client stopped in the middle of an exchange, where no time limit of Postgres holds; only TCP can tell."""
    lost = site.hosts[0]
    held = lost.start([sys.executable, "-c", _HOLDS, site.url("millpond_app", lost)], {})
    assert held.stdout is not None
    assert await asyncio.to_thread(held.stdout.readline) == b"held\n", lost.said()
    lost.cut_off()
    con = await asyncpg.connect(site.url("boss"))
    async with asyncio.timeout(DEADLINE_S):
        await con.fetch("select pg_advisory_lock(4711)")
    await con.close()


_HOLDS = """
import asyncio, sys, asyncpg
async def hold():
    con = await asyncpg.connect(sys.argv[1])
    await con.execute("begin; select pg_advisory_xact_lock(4711)")
    await con.prepare("select 1")
    print("held", flush=True)
    await asyncio.sleep(1000)
asyncio.run(hold())
"""
_CALLS = """
import json, sys, time, urllib.request
url, token = sys.argv[1:]
def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=10) as answer:
        return json.load(answer)
until = time.monotonic() + 40
while True:
    try:
        call("/readyz")
        break
    except OSError:
        assert time.monotonic() < until
        time.sleep(0.1)
run = call("/v1/runs", {"flow": "hosts.quick", "input": 1})
while run["state"] != "succeeded":
    assert time.monotonic() < until, run
    time.sleep(0.1)
    run = call("/v1/runs/" + run["id"])
print(json.dumps(run["output"]))
"""
