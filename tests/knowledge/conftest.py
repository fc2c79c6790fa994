"""A knowledge store on a fresh database, and an ingestion without the engine around it."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from millpond.db.pool import Database
from millpond.knowledge import indexing
from millpond.knowledge.records import Ingested
from millpond.knowledge.store import KnowledgeStore
from millpond.models import Embedder, open_embedder

DOCUMENTS = Path(__file__).parents[2] / "examples" / "documents"
Ingest = Callable[..., Awaitable[Ingested]]
Upload = Callable[..., Awaitable[uuid.UUID]]


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    """The bundled embedder, loaded once: it has a thread of its own and no tie to an event loop."""
    return open_embedder("local")


@pytest.fixture
def store(db: Database, embedder: Embedder) -> KnowledgeStore:
    return KnowledgeStore(db, embedder)


@pytest.fixture
def upload(db: Database, store: KnowledgeStore, org: int) -> Upload:
    async def upload(filename: str, content: bytes | str, base: str = "support") -> uuid.UUID:
        raw = content.encode() if isinstance(content, str) else content
        async with db.org(org) as con:
            document_id, _ = await store.add_document(con, org, base, filename, raw, "user:1")
        return document_id

    return upload


@pytest.fixture
def ingest(store: KnowledgeStore, org: int) -> Ingest:
    async def ingest(document_id: uuid.UUID) -> Ingested:
        source = await indexing.begin(store, org, document_id)
        await indexing.parse(store, org, source)
        total = await indexing.chunk(store, org, source)
        await indexing.embed(store, org, source, 0, total, total)
        return await indexing.publish(store, org, source)

    return ingest
