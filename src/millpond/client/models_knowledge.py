"""What the server answers about knowledge bases.

Made by `calls` from JSON. Invariant: as in `models`.
"""

from __future__ import annotations

import uuid
from datetime import datetime

from pydantic import Field

from millpond.client.models import Answer


class KnowledgeBase(Answer):
    """A knowledge base."""

    id: uuid.UUID
    name: str
    embedder: str
    documents: int = 0
    created_at: datetime


class Document(Answer):
    """A document: its newest upload, and how far its ingestion is."""

    id: uuid.UUID
    filename: str
    title: str
    media_type: str
    size_bytes: int
    digest: str
    version: int
    ready_version: int | None = None
    state: str
    stage: str | None = None
    progress: float = 0.0
    reason: str | None = None
    chunks: int | None = None
    run_id: uuid.UUID | None = None
    created_at: datetime
    updated_at: datetime


class Passage(Answer):
    """A cited passage: `text` is characters [start, end) of that version of the document."""

    document_id: uuid.UUID
    title: str
    filename: str
    version: int
    ordinal: int
    start: int
    end: int
    page: int | None = None
    text: str
    score: float
    vector_score: float
    text_score: float


class SearchResult(Answer):
    """What a question found, best first; empty when nothing reaches `min_score`."""

    query: str
    data: list[Passage] = Field(default_factory=list)
    min_score: float
    best_score: float | None = None
