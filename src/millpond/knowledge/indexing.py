"""The stages of an ingestion on the database: begin, parse, chunk, embed, publish, fail.

Called by the registered steps with the worker's `KnowledgeStore`. Invariant: each stage may run again
and then changes nothing that is done; no transaction is open while a document is read or embedded.
"""

from __future__ import annotations

import uuid

from millpond.db.queries import queries
from millpond.errors import Conflict, InvalidInput, NotFound, Permanent
from millpond.knowledge import reader
from millpond.knowledge.chunker import MAX_CHUNKS
from millpond.knowledge.records import Ingested, Source, Stage
from millpond.knowledge.retrieval import to_sql
from millpond.knowledge.store import KnowledgeStore

_SQL = queries("knowledge")
# Where each stage stands in the whole, as a share of the work: embedding is nearly all of it.
_BEGIN: dict[Stage, float] = {"parse": 0.0, "chunk": 0.1, "embed": 0.15, "index": 0.95}


async def begin(store: KnowledgeStore, org_id: int, document_id: uuid.UUID) -> Source:
    """Read what is to be ingested: the newest version; raises NotFound, Conflict (embedder)."""
    async with store.db.org(org_id) as con:
        row = await con.fetchrow(_SQL["document"], org_id, document_id)
    if row is None:
        raise NotFound(f"There is no document {document_id}.")
    if row["embedder"] != store.embedder.name:
        raise Conflict(
            f"The base's vectors come from {row['embedder']}; this worker runs "
            f"{store.embedder.name}.",
            code="other_embedder",
        )
    return Source(
        document_id=document_id,
        version=row["version"],
        media_type=row["media_type"],
        filename=row["filename"],
        is_ready=row["ready_version"] == row["version"],
    )


async def parse(store: KnowledgeStore, org_id: int, source: Source) -> int:
    """Store the text of a version; returns its length in characters."""
    await _stand(store, org_id, source, "parse")
    async with store.db.org(org_id) as con:
        content = await con.fetchval(_SQL["content"], org_id, source.document_id, source.version)
    if content is None:
        raise NotFound(f"Version {source.version} of {source.filename} is gone.")
    parsed = await reader.parse(source.media_type, content)
    key = (org_id, source.document_id, source.version)
    async with store.db.org(org_id) as con:
        await con.execute(_SQL["store_text"], *key, parsed.text, list(parsed.page_starts))
        if parsed.title:
            await con.execute(_SQL["set_title"], *key, parsed.title[:300])
    return len(parsed.text)


async def chunk(store: KnowledgeStore, org_id: int, source: Source) -> int:
    """Store the chunks of a version, without vectors; returns how many it has."""
    await _stand(store, org_id, source, "chunk")
    key = (org_id, source.document_id, source.version)
    async with store.db.org(org_id) as con:
        text = await con.fetchval(_SQL["text"], *key)
    if text is None:
        raise NotFound(f"The text of {source.filename} is gone.")
    spans = await reader.split(source.media_type, text)
    if not spans or len(spans) > MAX_CHUNKS:
        raise InvalidInput(
            f"{source.filename} makes {len(spans)} chunks; 1 to {MAX_CHUNKS} are accepted.",
            code="too_large",
        )
    async with store.db.org(org_id) as con:
        await con.execute(
            _SQL["store_chunks"], *key, [start for start, _ in spans], [end for _, end in spans]
        )
    return len(spans)


async def embed(
    store: KnowledgeStore, org_id: int, source: Source, first: int, end: int, total: int
) -> int:
    """Give chunks [first, end) of a version their vectors; returns how many lacked one."""
    share = _BEGIN["embed"] + (_BEGIN["index"] - _BEGIN["embed"]) * first / max(total, 1)
    await _stand(store, org_id, source, "embed", share)
    key = (org_id, source.document_id, source.version)
    async with store.db.org(org_id) as con:
        rows = await con.fetch(_SQL["unembedded"], *key, first, end)
    if not rows:
        return 0
    vectors = await store.embedder.embed([row["text"] for row in rows])
    async with store.db.org(org_id) as con:
        await con.execute(
            _SQL["store_vectors"],
            *key,
            [row["ordinal"] for row in rows],
            [to_sql(vector) for vector in vectors],
        )
    return len(rows)


async def publish(store: KnowledgeStore, org_id: int, source: Source) -> Ingested:
    """Make a version the one that searches see and drop what came before it, at once."""
    await _stand(store, org_id, source, "index")
    key = (org_id, source.document_id)
    async with store.db.org(org_id) as con:
        row = await con.fetchrow(_SQL["lock_document"], *key, source.version)
        if row is None:
            raise NotFound(f"Document {source.document_id} was deleted meanwhile.")
        is_newest = row["version"] == source.version
        if is_newest and (row["without_vector"] or not row["chunks"]):
            raise Permanent(
                f"{row['without_vector']} of {row['chunks']} chunks have no vector.",
                code="not_embedded",
            )
        if is_newest:
            await con.execute(_SQL["publish"], *key, source.version, row["chunks"])
        for what in ("drop_chunks", "drop_texts", "drop_contents"):
            await con.execute(_SQL[what], *key)
    return Ingested(
        document_id=source.document_id,
        version=source.version,
        outcome="indexed" if is_newest else "superseded",
        chunks=row["chunks"],
    )


async def fail(
    store: KnowledgeStore, org_id: int, document_id: uuid.UUID, version: int, reason: str
) -> bool:
    """Note on the document why its ingestion failed; returns whether it still concerned it."""
    async with store.db.org(org_id) as con:
        noted = await con.fetchval(_SQL["fail"], org_id, document_id, version, reason[:1000])
    return noted is not None


async def _stand(
    store: KnowledgeStore, org_id: int, source: Source, stage: Stage, share: float | None = None
) -> None:
    share = _BEGIN[stage] if share is None else share
    async with store.db.org(org_id) as con:
        await con.execute(_SQL["stand"], org_id, source.document_id, source.version, stage, share)
