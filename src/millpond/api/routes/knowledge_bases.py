"""Knowledge bases: upload documents, list them, search them.

Called by clients; there only when `cli` hands in a store. Invariant: a document and the run that
ingests it are accepted together or not at all.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from millpond.api.accept import (
    IdempotencyKey,
    accept_with,
    accepted_headers,
    accepted_json,
    promised,
)
from millpond.api.auth import Caller, requires
from millpond.api.bodies import described, read_body, read_json
from millpond.api.documented import ACCEPTED_HEADERS, failures
from millpond.api.models import (
    AcceptedRun,
    DocumentOut,
    KnowledgeBaseOut,
    Listing,
    SearchOut,
    SearchQuestion,
)
from millpond.api.ports import Ports
from millpond.api.reply import listing, reply
from millpond.api.shapes import base_json, document_json, search_json
from millpond.api.texts import PLAIN, Word
from millpond.db.pool import Connection
from millpond.knowledge.media import MAX_BYTES, MAX_NAME
from millpond.knowledge.store import KnowledgeStore
from millpond.types import Intent

router = APIRouter(prefix="/v1/knowledge-bases", tags=["knowledge"])

_ROUTE = "POST /v1/knowledge-bases/{name}/documents"
Reader = Annotated[Caller, requires("knowledge:read")]
Writer = Annotated[Caller, requires("knowledge:write")]
BaseName = Annotated[Word, Path(description="Name of the knowledge base.")]
_UPLOAD = {
    "requestBody": {
        "required": True,
        "description": "The file's bytes: Markdown, text, HTML or PDF.",
        "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get(
    "",
    operation_id="list_knowledge_bases",
    responses={200: {"model": Listing[KnowledgeBaseOut]}, **failures(401, 403, 503)},
)
async def list_knowledge_bases(caller: Reader) -> Response:
    """List knowledge bases by name."""
    bases = await _store(caller.ports).bases(caller.org_id, opened=caller.org)
    return reply(listing([base_json(base) for base in bases], has_more=False))


@router.post(
    "/{name}/documents",
    operation_id="add_document",
    status_code=202,
    openapi_extra=_UPLOAD,
    responses={
        202: {"model": AcceptedRun, "headers": ACCEPTED_HEADERS},
        **failures(400, 401, 402, 403, 409, 413, 422, 503),
    },
)
async def add_document(
    request: Request,
    caller: Writer,
    name: BaseName,
    filename: Annotated[
        str,
        Query(
            min_length=1,
            max_length=MAX_NAME,
            pattern=PLAIN,
            description="Relative path whose ending tells the type; the same name again is the next "
            "version of the document.",
        ),
    ],
    key: IdempotencyKey = None,
) -> Response:
    """Store a document and accept the run that ingests it; makes the knowledge base if needed."""
    content = await read_body(request, MAX_BYTES)
    store = _store(caller.ports)

    async def make(con: Connection) -> Intent:
        document_id, intent = await store.add_document(
            con,
            caller.org_id,
            name,
            filename,
            content,
            caller.principal.subject,
            caller.principal.backing("knowledge:write"),
        )
        await caller.tell(
            con,
            "document.added",
            f"document:{document_id}",
            details={
                "base": name,
                "filename": filename,
                "sha256": hashlib.sha256(content).hexdigest(),
            },
            run_id=intent.run_id,
        )
        return intent

    promise = promised(key, _ROUTE, lambda: _digest(name, filename, content))
    accepted = await accept_with(caller, make, promise)
    return reply(accepted_json(accepted), status=202, headers=accepted_headers(accepted))


@router.get(
    "/{name}/documents",
    operation_id="list_documents",
    responses={200: {"model": Listing[DocumentOut]}, **failures(401, 403, 404, 422, 503)},
)
async def list_documents(caller: Reader, name: BaseName) -> Response:
    """List the documents of a knowledge base by file name, with how far their ingestion is."""
    documents = await _store(caller.ports).documents(caller.org_id, name, opened=caller.org)
    return reply(listing([document_json(one) for one in documents], has_more=False))


@router.post(
    "/{name}/search",
    operation_id="search_knowledge_base",
    openapi_extra=described(SearchQuestion),
    responses={
        200: {"model": SearchOut},
        **failures(400, 401, 402, 403, 404, 409, 413, 415, 422, 503),
    },
)
async def search_knowledge_base(request: Request, caller: Reader, name: BaseName) -> Response:
    """Find the passages that answer a question, best first, each with its source."""
    question = await read_json(request, SearchQuestion)
    found = await _store(caller.ports).search(
        caller.org_id, name, question.query, question.limit, opened=caller.org
    )
    return reply(search_json(found))


def _store(ports: Ports) -> KnowledgeStore:
    assert ports.knowledge is not None  # the router is only there with a store
    return ports.knowledge


def _digest(name: str, filename: str, content: bytes) -> bytes:
    named = hashlib.sha256(f"{name}\x00{filename}\x00".encode())
    named.update(content)
    return named.digest()
