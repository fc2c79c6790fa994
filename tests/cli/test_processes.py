"""Several worker processes under one supervisor, and the process that executes a suspect run alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import psutil
import pytest
from tests.cli.conftest import FLOWS, ROOT, Up, clean_environment

from millpond.db.embedded import Urls
from millpond.db.pool import Database
from millpond.engine.submit import submit
from millpond.types import Intent

DEADLINE_S = 60.0
OWN_FLOWS = "tests.cli.process_flows"


async def until(what: str, holds: Callable[[], Any]) -> Any:
    """Wait until `holds` gives something true, and return it."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        found = await holds()
        if found:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {DEADLINE_S:.0f} s: {what}")


@contextmanager
def supervised(
    urls: Urls,
    log: Path,
    *options: str,
    flows: str = FLOWS,
    before: Sequence[str] = (),
    **settings: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `millpond worker` with these options until the block ends."""
    environment = clean_environment(
        MILLPOND_DATABASE_URL=urls.app,
        MILLPOND_ENGINE_DATABASE_URL=urls.engine,
        MILLPOND_EMBEDDER="openai:unused",
        MILLPOND_LEASE_S="1.5",
        MILLPOND_DATA_DIR=str(log.parent),
        **settings,
    )
    command = [*before, sys.executable, "-m", "millpond.cli", "worker", "--flows", flows, *options]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr)
    try:
        yield process
    finally:
        below = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.kill()
        process.wait()
        for one in below:
            one.kill()
        psutil.wait_procs(below, timeout=30)


async def live_pids(db: Database) -> set[int]:
    async with db.globals() as con:
        rows = await con.fetch("select pid from worker where expires_at > clock_timestamp()")
    return {row["pid"] for row in rows}


async def start(db: Database, org: int, flow: str, data: Any) -> uuid.UUID:
    intent = Intent(
        org_id=org,
        flow=flow,
        version=1,
        queue="default",
        input=orjson.dumps(data),
        subject="user:test",
    )
    async with db.org(org) as con:
        await submit(con, [intent])
    return intent.run_id


async def outcome(db: Database, org: int, run_id: uuid.UUID) -> str | None:
    async with db.org(org) as con:
        found: str | None = await con.fetchval("select outcome from run where run_id = $1", run_id)
    return found


def log_lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


async def test_a_killed_one_of_two_comes_back_and_runs_finish(
    urls: Urls, db: Database, org: int, folder: Path
) -> None:
    log = folder / "log"
    with supervised(urls, log, "--processes", "2", "--queues", "default:4") as supervisor:

        async def both() -> set[int] | None:
            pids = await live_pids(db)
            return pids if len(pids) == 2 else None

        first = await until("two workers are there", both)
        assert supervisor.pid not in first
        killed = min(first)
        os.kill(killed, signal.SIGKILL)

        async def both_again() -> set[int] | None:
            pids = await live_pids(db)
            return pids if len(pids) == 2 and killed not in pids else None

        second = await until("the killed one is replaced", both_again)
        assert len(second & first) == 1
        runs = [await start(db, org, "sample.shout", {"word": "x"}) for _ in range(20)]
        for run_id in runs:
            assert await until("a run ends", lambda r=run_id: outcome(db, org, r)) == "succeeded"
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(timeout=DEADLINE_S) == 0
        assert await live_pids(db) == set()
    named = {line["process"] for line in log_lines(log)}
    assert {"worker-1", "worker-2"} <= named
    stopped = [line["process"] for line in log_lines(log) if line["event"] == "worker.draining"]
    assert sorted(stopped) == ["worker-1", "worker-2"]


async def test_workers_end_when_their_supervisor_is_killed(
    urls: Urls, db: Database, org: int, folder: Path
) -> None:
    with supervised(urls, folder / "log", "--processes", "2") as supervisor:

        async def both() -> bool:
            return len(await live_pids(db)) == 2

        await until("two workers are there", both)
        supervisor.kill()

        async def none() -> bool:
            return not await live_pids(db)

        await until("both have ended", none)


async def make_suspect(admin_url: str) -> None:
    """Let what is queued be executed alone."""
    admin = await asyncpg.connect(admin_url)
    # As rescue leaves it after two deaths.
    await admin.execute(
        """
        set search_path = millpond;
        update item set deaths = 2, lane_id = lane_id | 3;
        update ready set lane_id = lane_id | 3;
        update arrival set lane_id = lane_id | 3, capability = capability || '!'
        """
    )
    await admin.close()


async def test_a_suspect_run_is_executed_by_a_process_of_its_own(
    urls: Urls, db: Database, org: int, folder: Path, admin_url: str
) -> None:
    run_id = await start(db, org, "sample.shout", {"word": "x"})
    await make_suspect(admin_url)
    log = folder / "log"
    with supervised(urls, log) as worker:
        assert await until("it ends", lambda: outcome(db, org, run_id)) == "succeeded"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=DEADLINE_S) == 0
    started = [line for line in log_lines(log) if line["event"] == "worker.started"]
    assert [line["process"] for line in started] == ["worker", "worker-alone"]


async def test_a_suspect_run_with_needs_is_executed_by_a_process_that_has_the_workers_labels(
    urls: Urls, db: Database, org: int, folder: Path, admin_url: str
) -> None:
    run_id = await start(db, org, "process.needy", "")
    await make_suspect(admin_url)
    log = folder / "log"
    labels = ("--label", "zone=a", "--label", "gpu=true")
    with supervised(urls, log, *labels, flows=OWN_FLOWS) as worker:
        assert await until("it ends", lambda: outcome(db, org, run_id)) == "succeeded"
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=DEADLINE_S) == 0
    started = [line["process"] for line in log_lines(log) if line["event"] == "worker.started"]
    assert started == ["worker", "worker-alone"]


async def test_a_drain_that_outlasts_its_grace_is_no_death_of_what_it_held(
    urls: Urls, db: Database, org: int, folder: Path, admin_url: str
) -> None:
    """Each deployment ends a thread that is not done; that makes no suspect of its run."""
    gate, log = folder / "gate", folder / "log"
    run_id = await start(db, org, "process.threaded", str(gate))

    async def told(kind: str) -> bool:
        async with db.org(org) as con:
            sql = "select exists (select from event where run_id = $1 and kind = $2)"
            found: bool = await con.fetchval(sql, run_id, kind)
        return found

    several = supervised(urls, log, "--processes", "2", flows=OWN_FLOWS, MILLPOND_DRAIN_S="0")
    with several as supervisor:
        await until("it is in its thread", lambda: told("step.started"))
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(timeout=DEADLINE_S) == 0
    assert [line["event"] for line in log_lines(log)].count("child_killed") == 1
    with supervised(urls, folder / "next", flows=OWN_FLOWS):
        await until("it is given back", lambda: told("run.rescued"))
        admin = await asyncpg.connect(admin_url)
        assert await admin.fetchval("select deaths from millpond.item") == 0
        await admin.close()
        gate.touch()
        assert await until("it ends", lambda: outcome(db, org, run_id)) == "succeeded"


def test_up_runs_as_many_workers_as_the_setting_says(
    started: Callable[..., Up], invoke: Callable[..., Any]
) -> None:
    up = started(MILLPOND_PROCESSES="2")
    assert len(set(up.worker_pids)) == 2
    assert up.worker_pid == up.worker_pids[0]
    place = {"MILLPOND_URL": up.url, "MILLPOND_DATA_DIR": str(up.data_dir)}
    done = invoke("runs", "start", "sample.shout", "--wait", "--timeout", "60", **place)
    assert done.exit_code == 0, done.stderr
    below = up.members()
    assert up.stop() == 0
    assert not any(one.is_running() for one in psutil.wait_procs(below, timeout=30)[1])
    log = up.log.read_text()
    assert log.index("Shutting down") < log.index("worker.draining")


@pytest.mark.slow
async def test_a_containers_first_process_does_not_keep_a_worker_that_is_stuck(
    urls: Urls, db: Database, org: int, folder: Path
) -> None:
    """Nothing in a container can kill its process 1; the worker below it can be ended by its heartbeat."""
    apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode != 0:
        pytest.skip("namespaces of processes cannot be made here")
    seen = folder / "seen"
    options = ("--queues", "default:2")
    with supervised(urls, folder / "log", *options, flows=OWN_FLOWS, before=apart):
        run_id = await start(db, org, "process.stuck", str(seen))
        assert await until("the run ends", lambda: outcome(db, org, run_id)) == "succeeded"
    ended = [line for line in log_lines(folder / "log") if line["event"] == "child_ended"]
    assert [line["exit_code"] for line in ended] == [-signal.SIGKILL]
