"""`millpond worker` and `millpond doctor` as an operator sets them up behind a pooler."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.cli.test_processes import DEADLINE_S, live_pids, outcome, start, supervised, until
from tests.pooler import PooledUrls

from millpond.cli.checks import check_pooler
from millpond.db.pool import Database


async def test_worker_processes_live_and_drain_behind_the_pooler(
    urls: PooledUrls, db: Database, org: int, tmp_path: Path
) -> None:
    settings = {"MILLPOND_LISTEN_DATABASE_URL": urls.direct.engine}
    options = ("--processes", "2", "--queues", "default:4")
    with supervised(urls, tmp_path / "log", *options, **settings) as supervisor:

        async def both() -> bool:
            return len(await live_pids(db)) == 2

        await until("two workers are there", both)
        runs = [await start(db, org, "sample.shout", {"word": "x"}) for _ in range(20)]
        for run_id in runs:
            assert await until("a run ends", lambda r=run_id: outcome(db, org, r)) == "succeeded"
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(timeout=DEADLINE_S) == 0
        assert await live_pids(db) == set()


async def test_doctor_has_nothing_to_say_against_it(urls: PooledUrls) -> None:
    for role, url in (("app", urls.app), ("engine", urls.engine)):
        assert [check.state for check in await check_pooler(role, url, urls.direct.engine)] == [
            "ok"
        ]
