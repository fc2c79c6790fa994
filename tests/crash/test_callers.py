"""A caller killed before or after the commit of what it asked for: it happened wholly, or not at all."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from typing import Any

import orjson
import pytest
from tests.crash.flows import REGISTRY, resources
from tests.crash.oracle import check
from tests.crash.sink import Sink
from tests.crash.workload import People, intent
from tests.engine.conftest import Pond

DEAD = -signal.SIGKILL


async def _ask(people: People, app_url: str, crash: str, **what: Any) -> int:
    """Let a process ask; returns its exit status, which is 0 when it was acknowledged."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.crash.caller_process",
        stdin=subprocess.PIPE,
        env={**os.environ, "MILLPOND_CRASH": crash},
    )
    await process.communicate(orjson.dumps({"app": app_url, "org_id": people.org_id, **what}))
    assert process.returncode is not None
    return process.returncode


@pytest.fixture
async def quiet(pond: Pond, sink: Sink) -> People:
    """People who decide nothing by themselves."""
    return People(pond.db, pond.org_id, sink)


async def _until(pond: Pond, run_id: uuid.UUID, sink: Sink, kind: str) -> None:
    """Work until the run has an event of a kind, then stop."""
    flows, given = list(REGISTRY.flows.values()), resources(str(sink.path))
    async with pond.worker(flows=flows, resources=given):
        await pond.until(run_id, kind)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_run_exists_once_its_submit_has_committed(
    pond: Pond, quiet: People, sink: Sink, when: str
) -> None:
    run_id = uuid.uuid4()
    asked = {"act": "submit", "run_id": str(run_id)}
    assert await _ask(quiet, pond.urls.app, f"{when}:org#1", **asked) == DEAD
    assert await pond.count("run") == (when == "after")
    if when == "before":
        assert await _ask(quiet, pond.urls.app, "", **asked) == 0
    await _until(pond, run_id, sink, "run.succeeded")
    await check(pond.engine_db, sink, [run_id])


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_cancel_holds_once_it_has_committed(
    pond: Pond, quiet: People, sink: Sink, when: str
) -> None:
    await quiet.submit([intent(pond.org_id, "crash.steps")])
    [run_id] = quiet.accepted
    asked = {"act": "cancel", "run_id": str(run_id)}
    assert await _ask(quiet, pond.urls.app, f"{when}:org#1", **asked) == DEAD
    if when == "before":
        assert await pond.kinds(run_id) == ["run.queued"]
    await _until(pond, run_id, sink, "run.cancelled" if when == "after" else "run.succeeded")
    await check(pond.engine_db, sink, [run_id])


@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_answer_counts_once_it_has_committed(
    pond: Pond, quiet: People, sink: Sink, when: str
) -> None:
    await quiet.submit([intent(pond.org_id, "crash.asks")])
    [run_id] = quiet.accepted
    await _until(pond, run_id, sink, "run.awaiting_input")
    async with pond.db.org(pond.org_id) as con:
        request_id = await con.fetchval("select request_id from input_request")
    asked = {"act": "resolve", "run_id": str(run_id), "request_id": str(request_id)}
    assert await _ask(quiet, pond.urls.app, f"{when}:org#1", **asked) == DEAD
    assert await pond.count("input_request", "state = 'pending'") == (when == "before")
    if when == "before":
        assert await _ask(quiet, pond.urls.app, "", **asked) == 0
    await _until(pond, run_id, sink, "run.succeeded")
    await check(pond.engine_db, sink, [run_id])
