"""The flow `knowledge.ingest` on a real worker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from tests import histories

from knowledge.conftest import DOCUMENTS
from millpond.db.embedded import Urls
from millpond.db.pool import Database, EngineDatabase
from millpond.engine.events import Event, Feed, page, tail
from millpond.engine.registry import REGISTRY
from millpond.engine.submit import submit
from millpond.engine.worker import Worker
from millpond.knowledge import flows
from millpond.knowledge.store import KnowledgeStore

Send = Callable[[str, bytes], Awaitable[uuid.UUID]]


@pytest.fixture
def send(db: Database, store: KnowledgeStore, org: int) -> Send:
    """Upload and submit in one transaction, as the API does."""

    async def send(filename: str, content: bytes) -> uuid.UUID:
        async with db.org(org) as con:
            _, intent = await store.add_document(con, org, "support", filename, content, "user:1")
            await submit(con, [intent])
        return intent.run_id

    return send


@asynccontextmanager
async def _working(
    urls: Urls, engine_db: EngineDatabase, store: KnowledgeStore
) -> AsyncIterator[None]:
    worker = Worker(
        database=engine_db,
        engine_url=urls.engine,
        listen_url=urls.app,
        flows=[REGISTRY.flows["knowledge.ingest", 1]],
        slots={"index": 2},
        resources={KnowledgeStore: store},
    )
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    try:
        yield
    finally:
        stop.set()
        await running


async def _to_the_end(urls: Urls, db: Database, org: int, run_id: uuid.UUID) -> list[Event]:
    feed = await Feed.connect(urls.app)
    try:
        async with asyncio.timeout(60):
            return [event async for event in tail(db, feed, org, run_id)]
    finally:
        await feed.close()


async def test_upload_becomes_searchable_by_recorded_stages(
    urls: Urls,
    db: Database,
    engine_db: EngineDatabase,
    store: KnowledgeStore,
    org: int,
    send: Send,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flows, "BATCH", 5)
    run_id = await send("manual.pdf", (DOCUMENTS / "ember-2-manual.pdf").read_bytes())
    async with _working(urls, engine_db, store):
        events = await _to_the_end(urls, db, org, run_id)
    assert events[-1].kind == "run.succeeded"
    done = [event.data["name"] for event in events if event.kind == "step.succeeded"]
    assert done == [
        "knowledge.begin",
        "knowledge.parse",
        "knowledge.chunk",
        "knowledge.embed",
        "knowledge.embed",
        "knowledge.embed",
        "knowledge.index",
    ]
    (document,) = await store.documents(org, "support")
    assert (document.status, document.chunks, document.run_id) == ("ready", 14, run_id)
    found = await store.search(org, "support", "The igniter clicks but does not spark")
    assert "4 mm" in found.passages[0].text


async def test_unreadable_document_fails_its_run_with_the_reason_on_it(
    urls: Urls,
    db: Database,
    engine_db: EngineDatabase,
    store: KnowledgeStore,
    org: int,
    send: Send,
) -> None:
    run_id = await send("broken.pdf", b"%PDF-1.7 and no more")
    async with _working(urls, engine_db, store):
        events = await _to_the_end(urls, db, org, run_id)
    assert events[-1].kind == "run.failed"
    (document,) = await store.documents(org, "support")
    assert (document.status, document.ready_version) == ("failed", None)
    assert document.reason == "The PDF is damaged and cannot be read."


async def test_second_worker_goes_on_where_the_first_was_stopped(
    urls: Urls,
    db: Database,
    engine_db: EngineDatabase,
    store: KnowledgeStore,
    org: int,
    send: Send,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flows, "BATCH", 4)
    batches: list[int] = []
    third = asyncio.Event()

    class Stalling:
        """The real embedder, but its third batch never comes back until it is told to."""

        name = store.embedder.name
        dimensions = 384
        is_stuck = True
        close = store.embedder.close

        async def embed(self, texts: Sequence[str]) -> list[list[float]]:
            batches.append(len(texts))
            if len(batches) == 3 and self.is_stuck:
                third.set()
                await asyncio.Event().wait()
            return await store.embedder.embed(texts)

    embedder = Stalling()
    stalled = KnowledgeStore(db, embedder)
    run_id = await send("policy.md", (DOCUMENTS / "returns-policy.md").read_bytes())
    worker = Worker(
        database=engine_db,
        engine_url=urls.engine,
        listen_url=urls.app,
        flows=[REGISTRY.flows["knowledge.ingest", 1]],
        slots={"index": 1},
        resources={KnowledgeStore: stalled},
        drain_s=0.1,
    )
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    async with asyncio.timeout(60):
        await third.wait()
    stop.set()
    await running
    embedder.is_stuck = False
    async with _working(urls, engine_db, stalled):
        events = await _to_the_end(urls, db, org, run_id)
    assert events[-1].kind == "run.succeeded"
    assert batches == [4, 4, 4, 4, 1]
    async with db.org(org) as con:
        kinds = [event.kind for event in await page(con, org, run_id)]
    assert kinds.count("run.succeeded") == 1


async def test_a_recorded_ingestion_is_replayed_by_the_code_of_today(
    urls: Urls,
    db: Database,
    engine_db: EngineDatabase,
    store: KnowledgeStore,
    org: int,
    send: Send,
    pytestconfig: pytest.Config,
) -> None:
    if pytestconfig.getoption("--renew-golden"):
        run_id = await send("policy.md", (DOCUMENTS / "returns-policy.md").read_bytes())
        async with _working(urls, engine_db, store):
            await _to_the_end(urls, db, org, run_id)
        await histories.save("knowledge-ingest", engine_db, run_id)
    found = await histories.replayed("knowledge-ingest", REGISTRY.flows["knowledge.ingest", 1])
    assert found.result == "ok", str(found)
