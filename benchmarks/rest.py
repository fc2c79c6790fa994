"""What an installation at rest costs in a minute: `python -m benchmarks.rest`, for a worker, for four, and for an API.

Run by hand. Nothing is submitted. Transactions are those that Postgres counts (a statement by itself is one);
processor time is that of the processes with their children (heartbeats), and that of all of Postgres. Needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.doors import api
from benchmarks.ground import Ground, end_on_sigterm, ground, machine, quiet
from benchmarks.measures import SLOTS
from benchmarks.worker import worker_process
from millpond.cli.loop import run_loop

_SETTLED_S = 3.0
_TRANSACTIONS = (
    "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()"
)


@dataclass(frozen=True, kw_only=True)
class Used:
    """What was used until now: transactions, processor seconds of some processes, and of Postgres."""

    transactions: int
    own_s: float
    postgres_s: float


def cpu_s(roots: Sequence[int]) -> float:
    """Return the processor seconds of processes and of all that descend from them."""
    ticks: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks[int(folder.name)] = int(words[1]), sum(map(int, words[11:15]))
    found = set(roots)
    while more := {pid for pid, (parent, _) in ticks.items() if parent in found} - found:
        found |= more
    used = sum(ticks[pid][1] for pid in found if pid in ticks)
    return used / os.sysconf("SC_CLK_TCK")


async def used(at: Ground, pids: Sequence[int], postmaster: int) -> Used:
    """Return what was used until now."""
    return Used(
        transactions=await at.server.ask(_TRANSACTIONS),
        own_s=cpu_s(pids),
        postgres_s=cpu_s([postmaster]),
    )


@asynccontextmanager
async def resting(at: Ground, workers: int, apis: int, folder: Path) -> AsyncIterator[list[int]]:
    """Run so many workers and APIs; gives their process ids."""
    before = set(_children())
    async with AsyncExitStack() as stack:
        for _ in range(workers):
            await stack.enter_async_context(worker_process(at.urls, SLOTS))
        for _ in range(apis):
            await stack.enter_async_context(api(at, folder))
        await asyncio.sleep(_SETTLED_S)
        yield sorted(set(_children()) - before)


def _children() -> list[int]:
    me = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


async def main() -> None:
    """Measure and print."""
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each is looked at")
    looked_s = parser.parse_args().seconds
    print(f"At rest, per minute; {machine()}")
    print(
        "| running | transactions | its processor time, ms | of Postgres, ms |\n|---|---|---|---|"
    )
    async with ground() as at:
        data = Path(await at.server.ask("show data_directory"))
        postmaster = int((data / "postmaster.pid").read_text().split()[0])
        for name, workers, apis in (
            *(("nothing", 0, 0), ("a worker", 1, 0), ("four workers", 4, 0), ("an API", 0, 1)),
        ):
            with tempfile.TemporaryDirectory() as folder:
                async with resting(at, workers, apis, Path(folder)) as pids:
                    before = await used(at, pids, postmaster)
                    await asyncio.sleep(looked_s)
                    after = await used(at, pids, postmaster)
            per_minute = 60 / looked_s
            print(
                f"| {name} | {(after.transactions - before.transactions) * per_minute:.0f}"
                f" | {(after.own_s - before.own_s) * per_minute * 1000:.0f}"
                f" | {(after.postgres_s - before.postgres_s) * per_minute * 1000:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    quiet()
    run_loop(main())
