"""Health, readiness, and what happens while Postgres is away."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from millpond.api.readiness import Readiness
from millpond.db.embedded import EmbeddedPostgres
from millpond.db.migrate import migrate
from millpond.db.pool import Database, EngineDatabase
from millpond.errors import SchemaMismatch
from millpond.identity.orgs import ensure_org

from .conftest import DEADLINE_S, Client, Front, opened, served


async def test_healthy_and_ready(front: Front) -> None:
    nobody = await front.client(token="")
    assert (await nobody.get("/healthz")).json() == {"status": "ok"}
    assert (await nobody.get("/readyz")).json() == {"status": "ok"}


async def test_not_ready_on_another_schema(front: Front, ann: Client) -> None:
    async def mismatch() -> None:
        raise SchemaMismatch("The database is older.", advice="Run `millpond migrate`.")

    ports = front.app.state.ports
    front.app.state.ports = replace(ports, readiness=Readiness(front.db, mismatch))
    response = await ann.get("/readyz")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["advice"] == "Run `millpond migrate`."


async def test_many_who_ask_cause_one_look(front: Front, ann: Client) -> None:
    looks = 0

    async def look() -> None:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0)

    ports = front.app.state.ports
    front.app.state.ports = replace(ports, readiness=Readiness(front.db, look))
    responses = await asyncio.gather(*(ann.get("/readyz") for _ in range(20)))
    assert {response.status_code for response in responses} == {200}
    assert looks < 20


async def test_not_ready_while_stopping(front: Front, ann: Client) -> None:
    front.app.state.ports.stopping.set()
    response = await ann.get("/readyz")
    assert response.status_code == 503
    assert (await ann.get("/healthz")).status_code == 200


@pytest.fixture
async def own_server() -> AsyncIterator[EmbeddedPostgres]:
    """A Postgres that a test may stop."""
    folder = Path(tempfile.mkdtemp(prefix="millpond-test-own-"))
    folder.chmod(0o711)
    server = EmbeddedPostgres(folder, owner_note="tests", options={"shared_buffers": "32MB"})
    try:
        yield server
    finally:
        await server.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def test_postgres_down_gives_503_and_its_return_is_noticed(
    own_server: EmbeddedPostgres,
) -> None:
    urls = await own_server.start()
    await migrate(urls.owner, app_url=urls.app, engine_url=urls.engine)
    async with AsyncExitStack() as closing:
        db = await Database.connect(urls.app)
        closing.push_async_callback(db.close)
        engine_db = await EngineDatabase.connect(urls.engine)
        closing.push_async_callback(engine_db.close)
        org_id = await ensure_org(db, "pond", "Pond")
        app = await closing.enter_async_context(opened(urls, db))
        url = await closing.enter_async_context(served(app))
        front = Front(url, urls, db, engine_db, org_id, app.state.ports.gate.keyring, app, closing)
        ann = await front.client()
        await front.publish()
        body = {"flow": "echo"}
        headers = {"Idempotency-Key": "k1"}
        assert (await ann.post("/v1/runs", json=body)).status_code == 202

        await own_server.stop()
        for _ in range(3):
            refused = await ann.post("/v1/runs", json=body, headers=headers)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "unavailable_error"
        for path in ("/readyz", "/v1/runs", "/v1/queues"):
            response = await ann.get(path)
            assert response.status_code == 503, path
            assert int(response.headers["retry-after"]) >= 1
        assert (await ann.get("/healthz")).status_code == 200

        await own_server.start()
        async with asyncio.timeout(DEADLINE_S):
            while (await ann.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
        assert (await ann.post("/v1/runs", json=body, headers=headers)).status_code == 202
        runs = (await ann.get("/v1/runs")).json()["data"]
        assert len(runs) == 2  # before and after: none of the refused ones


async def test_metrics_are_not_served_to_anybody(front: Front, ann: Client) -> None:
    """No route serves any yet; one that does has to ask for `metrics:read`, as the matrix sees to."""
    nobody = await front.client(token="")
    for caller in (nobody, ann):
        assert (await caller.get("/metrics")).status_code == 404
