"""The small types of knowledge: bases, documents, passages with citations, and what ingestion says.

Pure. Passed between `store`, `retrieval`, `steps` and the API; all of them go to JSON by pydantic.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["pending", "processing", "ready", "failed"]
Stage = Literal["parse", "chunk", "embed", "index"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Base(_Record):
    """A knowledge base; its vectors come from `embedder`."""

    id: uuid.UUID
    name: str
    embedder: str


class BaseSummary(Base):
    """A knowledge base in a list."""

    documents: int
    created_at: datetime


class Document(_Record):
    """A document as its org sees it: the newest upload, and how far its ingestion is.

    `ready_version` is what searches see, if any; `progress` goes from 0 to 1; `reason` says why it
    failed; `digest` is the SHA-256 of the bytes.
    """

    id: uuid.UUID
    filename: str
    title: str
    media_type: str
    size_bytes: int
    digest: str
    version: int
    ready_version: int | None
    status: Status
    stage: Stage | None
    progress: float
    reason: str | None
    chunks: int | None
    run_id: uuid.UUID | None
    created_at: datetime
    updated_at: datetime


class Passage(_Record):
    """A cited passage: `text` is characters [start, end) of that version of the document.

    `score` is the weighted sum of `vector_score` (cosine) and `text_score` (share of the question's
    words, by rarity); `page` counts from 1 where the document has pages.
    """

    document_id: uuid.UUID
    title: str
    filename: str
    version: int
    ordinal: int
    start: int
    end: int
    page: int | None
    text: str
    score: float
    vector_score: float
    text_score: float


class SearchResult(_Record):
    """What a question found, best first; empty when nothing reaches `min_score`.

    `best_score` is that of the best passage, also of one below the cut-off: None in an empty base.
    """

    query: str
    passages: list[Passage] = Field(default_factory=list)
    min_score: float
    best_score: float | None

    @property
    def has_answer(self) -> bool:
        """Whether anything reached the cut-off."""
        return bool(self.passages)


class Source(_Record):
    """The version of a document that a run ingests; nothing is left to do when `is_ready`."""

    document_id: uuid.UUID
    version: int
    media_type: str
    filename: str
    is_ready: bool


class Ingested(_Record):
    """What an ingestion did. `superseded`: a newer version was uploaded meanwhile."""

    document_id: uuid.UUID
    version: int
    outcome: Literal["indexed", "unchanged", "superseded"]
    chunks: int
