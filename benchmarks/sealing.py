"""Sealing: how long rows of the audit log wait for their seal, while the API that seals them accepts runs.

Run by `python -m benchmarks.sealing [--orgs N] [--rate N] [--seconds S] [--backlog N]`. Rows are told in transactions
of the orgs, spread over them, as deeds are; one org may have a backlog from before. Invariants: the sealer is that of
`millpond api` as it is started; waits are by the database's clock, from a row's `at` to its seal's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import asyncpg
import orjson
import uvloop

from benchmarks.doors import doors
from benchmarks.figures import Figure, percentile, store
from benchmarks.flows import accepted
from benchmarks.ground import PAYLOAD, Ground, end_on_sigterm, ground, machine, quiet
from benchmarks.load import loader
from millpond.identity import audit
from millpond.types import Principal

BOUND_S = 2.0
CONNECTIONS = 32
TELLERS = 4
_END_S = 600.0
_BODY = orjson.dumps({"flow": accepted.name, "input": orjson.Fragment(PAYLOAD)})
# The orgs that rows are told in, so that a backlog's own rows are not among what is measured.
_WAITS = """
select extract(epoch from s.sealed_at - a.at)::float8 as wait_s
from millpond.audit a left join millpond.audit_seal s on s.org_id = a.org_id and s.audit_id = a.audit_id
where a.org_id = any($1) and a.action = 'bench.told'
"""
_BACKLOG = """
insert into audit (org_id, audit_id, subject, action, resource)
select $1, gen_random_uuid(), 'user:bench', 'bench.backlog', 'thing:' || n from generate_series(1, $2::int) n
"""


async def _tell(at: Ground, orgs: Sequence[int], rate: float, until: float) -> None:
    """Tell rows in turn in all orgs, so many a second."""
    began, turns = time.monotonic(), itertools.count()

    async def teller() -> None:
        for nth in turns:
            due = began + nth / rate
            if due >= until:
                return
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            who = Principal(org_id=orgs[nth % len(orgs)], subject="user:bench")
            async with at.db.of(who) as con:
                await audit.record(con, who, "bench.told", f"thing:{nth}")

    await asyncio.gather(*(teller() for _ in range(TELLERS)))


async def _waits(at: Ground, orgs: Sequence[int]) -> list[float]:
    """Wait until all that was told is sealed; returns how long each row waited, in seconds."""
    con = await asyncpg.connect(at.server.admin_url)
    try:
        async with asyncio.timeout(_END_S):
            while True:
                found = [row["wait_s"] for row in await con.fetch(_WAITS, list(orgs))]
                if None not in found:
                    return found
                await asyncio.sleep(0.2)
    finally:
        await con.close()


async def measure(orgs: int, rate: float, seconds: float, backlog: int) -> list[Figure]:
    """Tell rows beside a load on the API; returns how long they waited for their seals."""
    with tempfile.TemporaryDirectory(prefix="millpond-bench-") as folder:
        async with ground() as at, loader() as load:
            busy, *told = await at.orgs(orgs + 1)
            await at.clear([accepted], 1)  # publishes the flow
            async with doors(at, busy, Path(folder)) as ways:
                if backlog:
                    async with at.db.org(busy) as con:
                        await con.execute(_BACKLOG, busy, backlog)
                telling = asyncio.create_task(_tell(at, told, rate, time.monotonic() + seconds))
                turn = await load.turn(
                    port=ways.api.port,
                    path=ways.api.path,
                    token=ways.api.token,
                    body=_BODY,
                    connections=CONNECTIONS,
                    seconds=seconds,
                )
                await telling
                waits = await _waits(at, told)
    median = Figure.of("sealing", "wait for a seal, median", "s", waits)
    many = {
        "wait for a seal, p99": percentile(waits, 0.99),
        "wait for a seal, longest": max(waits),
    }
    return [
        *[
            replace(median, figure=name, median=value, runs=[value])
            for name, value in (("wait for a seal, median", median.median), *many.items())
        ],
        Figure.of("sealing", "rows told", "rows", [float(len(waits))]),
        Figure.of("sealing", f"sealed within {BOUND_S:g} s", "%", [_share(waits) * 100]),
        Figure.of("sealing", "accepted beside it", "req/s", [turn.rate]),
    ]


def _share(waits: Sequence[float]) -> float:
    return sum(wait <= BOUND_S for wait in waits) / len(waits)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--orgs", type=int, default=200, help="among which rows are spread")
    parser.add_argument("--rate", type=float, default=200.0, help="rows told in a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--backlog", type=int, default=0, help="rows of one more org, from before")
    given = parser.parse_args()
    quiet()

    async def run() -> list[Figure]:
        end_on_sigterm()
        return await measure(given.orgs, given.rate, given.seconds, given.backlog)

    figures = uvloop.run(run())
    print(
        f"\nMillpond on {machine()}: {given.rate:g} rows/s in {given.orgs} organizations for"
        f" {given.seconds:g} s beside {CONNECTIONS} connections that start runs, a backlog of {given.backlog} rows"
    )
    for figure in figures:
        print(figure.line())
    print(f"\nwritten to {store(figures, Path('benchmarks/out/sealing'))}")


if __name__ == "__main__":
    main()
