"""Knowledge bases and documents in Postgres, and search in them.

Called by the API (uploads, lists, search) and, as a worker's resource, by registered steps. Invariant:
an upload stores bytes and row in the caller's transaction, so that document and run exist together or
not at all; what searches see changes in one statement.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import TypeAlias

import orjson

from millpond.db.pool import Block, Connection, Database, Record
from millpond.db.queries import queries
from millpond.engine import features
from millpond.errors import Conflict, InvalidInput, NotFound
from millpond.identity import holdings
from millpond.knowledge import retrieval
from millpond.knowledge.media import check_filename, media_type
from millpond.knowledge.records import Base, BaseSummary, Document, Passage, SearchResult
from millpond.models.port import Embedder
from millpond.types import Backing, Intent, new_id

_SQL = queries("knowledge")
_BASE_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,62}$")
Opened: TypeAlias = Callable[[], Block]
INGEST_FLOW = "knowledge.ingest"
INGEST_VERSION = 1
INGEST_QUEUE = "index"


@dataclass(frozen=True)
class KnowledgeStore:
    """The door to knowledge: one per process, for all orgs."""

    db: Database
    embedder: Embedder

    async def create_base(self, org_id: int, name: str) -> Base:
        """Make the knowledge base `name`, or return it when it is there.

        Raises InvalidInput for a name that is not lower-case letters, digits, `-` and `_`.
        """
        async with self.db.org(org_id) as con:
            base = await self.ensure_base(con, org_id, name)
            await holdings.check(con, org_id, *holdings.KNOWLEDGE)
            return base

    async def ensure_base(self, con: Connection, org_id: int, name: str) -> Base:
        """Make the knowledge base inside the caller's org transaction, or return it."""
        if not _BASE_NAME.match(name):
            raise InvalidInput(
                "A knowledge base's name is 1 to 63 of a-z, 0-9, - and _, not beginning with - or _.",
                param="name",
            )
        row = await con.fetchrow(_SQL["create_base"], org_id, new_id(), name, self.embedder.name)
        if row is None:
            # Another transaction made it after this statement's snapshot.
            return await self._base(con, org_id, name)
        return _base(row)

    async def bases(self, org_id: int, *, opened: Opened | None = None) -> list[BaseSummary]:
        """List the org's knowledge bases by name; `opened` as for `search`."""
        async with (opened or partial(self.db.org, org_id))() as con:
            rows = await con.fetch(_SQL["bases"], org_id)
        return [
            BaseSummary(
                id=row["base_id"],
                name=row["name"],
                embedder=row["embedder"],
                documents=row["documents"],
                created_at=row["created_at"],
            )
            for row in rows
        ]

    async def add_document(
        self,
        con: Connection,
        org_id: int,
        base: str,
        filename: str,
        content: bytes,
        subject: str,
        backing: Backing | None = None,
    ) -> tuple[uuid.UUID, Intent]:
        """Store an upload and return its document's id and the intent to ingest it.

        `con` is the caller's org transaction, in which it submits the intent. The base is made when
        it is missing. The same name with other bytes becomes the document's next version. Raises
        InvalidInput naming the field, Conflict when the base's vectors come from another embedder.
        """
        name = check_filename(filename)
        media = media_type(name, content)
        found = await self.ensure_base(con, org_id, base)
        self._check_embedder(found, base)
        intent_id = new_id()
        row = await con.fetchrow(
            _SQL["upload"],
            org_id,
            new_id(),
            found.id,
            name,
            PurePosixPath(name).stem,
            media,
            len(content),
            hashlib.sha256(content).digest(),
            intent_id,
        )
        assert row is not None
        document_id: uuid.UUID = row["document_id"]
        await con.execute(_SQL["store_content"], org_id, document_id, row["version"], content)
        await holdings.check(con, org_id, *holdings.KNOWLEDGE)
        intent = _ingest_intent(org_id, document_id, subject, intent_id)
        return document_id, replace(intent, backing=backing)

    async def documents(
        self, org_id: int, base: str, *, opened: Opened | None = None
    ) -> list[Document]:
        """List the documents of a base by file name; `opened` as for `search`.

        Raises NotFound for an unknown base.
        """
        async with (opened or partial(self.db.org, org_id))() as con:
            found = await self._base(con, org_id, base)
            rows = await con.fetch(_SQL["documents"], org_id, found.id)
        return [_document(row) for row in rows]

    async def remove_document(self, org_id: int, document_id: uuid.UUID) -> None:
        """Delete a document with all of its versions, texts and chunks; raises NotFound."""
        async with self.db.org(org_id) as con:
            if await con.fetchval(_SQL["remove"], org_id, document_id) is None:
                raise NotFound(f"There is no document {document_id}.")

    async def cite(
        self, org_id: int, document_id: uuid.UUID, version: int, start: int, end: int
    ) -> str:
        """Return characters [start, end) of a document's version: what a citation points at.

        Raises NotFound when the version or the span does not exist (any more).
        """
        async with self.db.org(org_id) as con:
            row = await con.fetchrow(_SQL["text"], org_id, document_id, version)
        if row is None or not 0 <= start < end <= len(row["text"]):
            raise NotFound(f"Document {document_id} has no such span in version {version}.")
        text: str = row["text"]
        return text[start:end]

    async def search(
        self,
        org_id: int,
        base: str,
        query: str,
        limit: int = 5,
        min_score: float | None = None,
        *,
        opened: Opened | None = None,
    ) -> SearchResult:
        """Return the passages that answer `query`, best first, with citations and scores.

        Vectors and full text are fused by weight; what stays below `min_score` (by default
        `retrieval.MIN_SCORE`) is left out, so that nothing may come back. `opened` opens transactions in the
        org as a caller whose rights are asked each time. Raises NotFound for an unknown base, Conflict when its
        vectors come from another embedder.
        """
        opened = opened or partial(self.db.org, org_id)
        asked = retrieval.check_query(query, limit)
        cut_off = retrieval.MIN_SCORE if min_score is None else min_score
        async with opened() as con:
            await features.check(con, org_id, "knowledge")
            found = await self._base(con, org_id, base)
        self._check_embedder(found, base)
        vector = retrieval.to_sql((await self.embedder.embed([asked]))[0])
        async with opened() as con:
            rows = await con.fetch(
                _SQL["search"],
                org_id,
                found.id,
                vector,
                asked,
                retrieval.VECTOR_WEIGHT,
                retrieval.TEXT_WEIGHT,
                max(retrieval.CANDIDATES, limit),
                limit,
            )
        passages = [_passage(row) for row in rows]
        return SearchResult(
            query=asked,
            passages=[passage for passage in passages if passage.score >= cut_off],
            min_score=cut_off,
            best_score=passages[0].score if passages else None,
        )

    async def _base(self, con: Connection, org_id: int, name: str) -> Base:
        row = await con.fetchrow(_SQL["base_by_name"], org_id, name)
        if row is None:
            raise NotFound(f"There is no knowledge base {name!r}.", param="name")
        return _base(row)

    def _check_embedder(self, base: Base, name: str) -> None:
        if base.embedder != self.embedder.name:
            raise Conflict(
                f"The vectors of knowledge base {name!r} come from {base.embedder}; this process "
                f"runs {self.embedder.name}.",
                code="other_embedder",
                advice=f"Set MILLPOND_EMBEDDER to {base.embedder}, or use a new knowledge base.",
            )


def _ingest_intent(org_id: int, document_id: uuid.UUID, subject: str, run_id: uuid.UUID) -> Intent:
    return Intent(
        org_id=org_id,
        flow=INGEST_FLOW,
        version=INGEST_VERSION,
        queue=INGEST_QUEUE,
        input=orjson.dumps({"document_id": str(document_id)}),
        subject=subject,
        run_id=run_id,
    )


def _base(row: Record) -> Base:
    return Base(id=row["base_id"], name=row["name"], embedder=row["embedder"])


def _document(row: Record) -> Document:
    return Document(
        id=row["document_id"],
        filename=row["filename"],
        title=row["title"],
        media_type=row["media_type"],
        size_bytes=row["size_bytes"],
        digest=row["digest"],
        version=row["version"],
        ready_version=row["ready_version"],
        status=row["status"],
        stage=row["stage"],
        progress=row["progress"],
        reason=row["reason"],
        chunks=row["chunk_count"],
        run_id=row["run_id"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


def _passage(row: Record) -> Passage:
    return Passage(
        document_id=row["document_id"],
        title=row["title"],
        filename=row["filename"],
        version=row["version"],
        ordinal=row["ordinal"],
        start=row["start_char"],
        end=row["end_char"],
        page=row["page"],
        text=row["text"],
        score=round(row["score"], 4),
        vector_score=round(row["vector_score"], 4),
        text_score=round(row["text_score"], 4),
    )
