"""Calls about knowledge bases and their documents."""

from __future__ import annotations

from dataclasses import replace

from millpond.client.call import Call, get, given, path_of, post, post_once
from millpond.client.models import Page, RunData
from millpond.client.models_knowledge import Document, KnowledgeBase, SearchResult

_ROOT = "knowledge-bases"


def list_knowledge_bases() -> Call[Page[KnowledgeBase]]:
    """Knowledge bases by name."""
    return get(path_of(_ROOT), Page[KnowledgeBase])


def upload_document(
    name: str, filename: str, content: bytes, *, idempotency_key: str | None = None
) -> Call[RunData]:
    """Store a document in a knowledge base, made if needed, and start the run that ingests it.

    The ending of `filename` tells its type; the same name again is the document's next version.
    """
    call = post_once(path_of(_ROOT, name, "documents"), RunData, key=idempotency_key)
    return replace(call, params={"filename": filename}, content=content)


def list_documents(name: str) -> Call[Page[Document]]:
    """The documents of a knowledge base by file name, with how far their ingestion is."""
    return get(path_of(_ROOT, name, "documents"), Page[Document])


def search_knowledge_base(name: str, query: str, *, limit: int | None = None) -> Call[SearchResult]:
    """Find the passages that answer a question, best first, each with its source."""
    body = {"query": query, **given({"limit": limit})}
    return replace(post(path_of(_ROOT, name, "search"), SearchResult, body), is_same_twice=True)
