"""Registered steps on knowledge: search, and the stages of an ingestion.

Used by flows; the worker holds the `KnowledgeStore` as a resource. Invariant: the org comes from the
run, never from an argument.
"""

from __future__ import annotations

import uuid

from millpond.engine.context import StepContext
from millpond.engine.registry import step
from millpond.knowledge import indexing
from millpond.knowledge.records import Ingested, SearchResult, Source
from millpond.knowledge.store import KnowledgeStore


@step("knowledge.search", timeout_s=60.0)
async def search(
    step: StepContext,
    base: str,
    query: str,
    limit: int = 5,
    min_score: float | None = None,
) -> SearchResult:
    """Return the passages of a knowledge base that answer `query`; none, when nothing does."""
    store = step.get(KnowledgeStore)
    return await store.search(step.org_id, base, query, limit, min_score)


@step("knowledge.begin", timeout_s=30.0)
async def begin(step: StepContext, document_id: uuid.UUID) -> Source:
    """Read which version of a document is to be ingested."""
    return await indexing.begin(step.get(KnowledgeStore), step.org_id, document_id)


@step("knowledge.parse", timeout_s=120.0)
async def parse(step: StepContext, source: Source) -> int:
    """Turn the bytes of a version into text; returns its length in characters."""
    return await indexing.parse(step.get(KnowledgeStore), step.org_id, source)


@step("knowledge.chunk", timeout_s=120.0)
async def chunk(step: StepContext, source: Source) -> int:
    """Cut the text of a version into chunks; returns how many."""
    return await indexing.chunk(step.get(KnowledgeStore), step.org_id, source)


@step("knowledge.embed", timeout_s=300.0)
async def embed(step: StepContext, source: Source, first: int, end: int, total: int) -> int:
    """Give one batch of chunks its vectors; returns how many lacked one."""
    return await indexing.embed(step.get(KnowledgeStore), step.org_id, source, first, end, total)


@step("knowledge.index", timeout_s=60.0)
async def index(step: StepContext, source: Source) -> Ingested:
    """Make a version the one that searches see."""
    return await indexing.publish(step.get(KnowledgeStore), step.org_id, source)


@step("knowledge.fail", timeout_s=30.0)
async def fail(step: StepContext, document_id: uuid.UUID, version: int, reason: str) -> bool:
    """Note on the document why its ingestion failed."""
    return await indexing.fail(step.get(KnowledgeStore), step.org_id, document_id, version, reason)
