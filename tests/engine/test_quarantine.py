"""Quarantine: what kills its workers is executed alone, and failed if that process dies too."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import psutil
from tests.engine.conftest import DEADLINE_S, Pond

LEASE_S = 2.0


@asynccontextmanager
async def kept_alive(pond: Pond) -> AsyncIterator[list[int]]:
    """Keep a worker process alive, as a supervisor does; yields the ids of those that were started."""
    orders = orjson.dumps({"engine": pond.urls.engine, "lease_s": LEASE_S}).decode()
    pids: list[int] = []
    processes: list[asyncio.subprocess.Process] = []

    async def keep() -> None:
        while True:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.engine.deadly_process", orders
            )
            processes.append(process)
            pids.append(process.pid)
            await process.wait()

    await _until_deaths_count(pond)
    keeping = asyncio.create_task(keep())
    try:
        yield pids
    finally:
        keeping.cancel()
        for process in processes:
            if process.returncode is None:
                with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by now
                    for one in psutil.Process(process.pid).children(recursive=True):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            one.kill()
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


async def _until_deaths_count(pond: Pond) -> None:
    """Wait until Postgres has been up for so long that a silent worker counts as dead."""
    async with asyncio.timeout(DEADLINE_S), pond.engine_db.statement("test") as con:
        await con.execute(
            "select pg_sleep(greatest(0, $1 - extract(epoch from"
            " clock_timestamp() - pg_postmaster_start_time())))",
            2.5 * LEASE_S,
        )


def _data(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"folder": str(tmp_path), "lives": 99, "neighbours": 0, **more}


def _pids(tmp_path: Path, word: str) -> list[int]:
    lines = (tmp_path / "log").read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith(word)]


async def test_a_run_that_kills_three_workers_is_poison_and_its_neighbours_succeed(
    pond: Pond, tmp_path: Path
) -> None:
    async with kept_alive(pond) as workers, asyncio.timeout(4 * DEADLINE_S):
        bad = await pond.submit("tests.deadly", _data(tmp_path, neighbours=3))
        good = [await pond.submit("tests.neighbour", _data(tmp_path)) for _ in range(3)]
        poisoned = await pond.ended(bad)
        rows = [await pond.ended(run_id) for run_id in good]
    assert poisoned["outcome"] == "failed"
    assert poisoned["error"]["code"] == "poison"
    assert "3 times" in poisoned["error"]["message"]
    assert "release" in poisoned["error"]["advice"]
    # A rescue after a silence of everybody charges nothing, so that there may be more than three.
    assert poisoned["attempts"] >= 3
    kinds = await pond.kinds(bad)
    assert kinds.count("run.rescued") == poisoned["attempts"] - 1
    assert kinds[-1] == "run.failed"
    assert [row["outcome"] for row in rows] == ["succeeded"] * 3
    deadly = _pids(tmp_path, "deadly")
    assert len(deadly) == poisoned["attempts"]
    assert set(deadly[:-1]) <= set(workers)
    # The last process was its own, and nobody else was ever in it.
    assert deadly[-1] not in workers
    assert deadly[-1] not in _pids(tmp_path, "neighbour")
    assert await pond.count("lease") == 0
    assert await pond.count("item") == 0
    assert len(_pids(tmp_path, "before")) == 1


async def test_a_run_that_kills_only_two_workers_succeeds_alone(pond: Pond, tmp_path: Path) -> None:
    async with kept_alive(pond) as workers, asyncio.timeout(3 * DEADLINE_S):
        row = await pond.ended(await pond.submit("tests.deadly", _data(tmp_path, lives=2)))
    assert row["output"] == 3
    assert row["attempts"] == 3
    assert _pids(tmp_path, "deadly")[2] not in workers


async def test_a_suspect_that_comes_to_a_wait_alone_goes_on_beside_others(
    pond: Pond, tmp_path: Path
) -> None:
    async with kept_alive(pond) as workers, asyncio.timeout(3 * DEADLINE_S):
        run_id = await pond.submit("tests.weary", _data(tmp_path, lives=2))
        await pond.until(run_id, "run.waiting")
        assert await pond.count("item", "deaths > 0 or lane_id & 2 = 2") == 0
        row = await pond.ended(run_id)
    assert _pids(tmp_path, "deadly")[2] not in workers
    assert row["output"] in workers


async def test_a_run_that_eats_all_memory_fails_alone(pond: Pond, tmp_path: Path) -> None:
    async with kept_alive(pond), asyncio.timeout(4 * DEADLINE_S):
        hungry = await pond.submit("tests.hungry", _data(tmp_path))
        row = await pond.ended(hungry)
        after = await pond.ended(await pond.submit("tests.neighbour", _data(tmp_path)))
    assert (row["outcome"], row["error"]["code"]) == ("failed", "poison")
    assert after["outcome"] == "succeeded"


async def test_what_waits_for_a_poisoned_run_is_seen_to(pond: Pond, tmp_path: Path) -> None:
    """A delayed start and a question leave rows that end with the run."""
    async with kept_alive(pond), asyncio.timeout(4 * DEADLINE_S):
        run_id = await pond.submit("tests.deadly", _data(tmp_path), delay_s=0.1, deadline_s=600)
        row = await pond.ended(run_id)
    assert row["error"]["code"] == "poison"
    assert await pond.count("timer") == 0
