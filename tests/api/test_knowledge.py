"""Knowledge over HTTP: upload, ingest, list, search; one document per key."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from millpond.db.embedded import Urls
from millpond.db.pool import Database
from millpond.knowledge.flows import ingest
from millpond.knowledge.store import KnowledgeStore

from .conftest import ALL, Client, Front, opened

RETURNS = b"# Returns\n\nYou may return a kettle within 30 days of delivery, unused, in its box.\n"


async def upload(
    client: Client, content: bytes = RETURNS, *, filename: str = "returns.md", key: str = ""
) -> httpx2.Response:
    return await client.post(
        "/v1/knowledge-bases/shop/documents",
        params={"filename": filename},
        content=content,
        headers={"Idempotency-Key": key} if key else {},
    )


async def documents(client: Client) -> list[dict[str, Any]]:
    page = (await client.get("/v1/knowledge-bases/shop/documents")).json()
    found: list[dict[str, Any]] = page["data"]
    return found


async def test_uploaded_document_is_ingested_and_found(front: Front, ann: Client) -> None:
    store = front.app.state.ports.knowledge
    front.registry.add_flow(ingest)
    async with front.worker({KnowledgeStore: store}, index=2):
        response = await upload(ann)
        assert response.status_code == 202
        run = response.json()
        assert response.headers["location"] == f"/v1/runs/{run['id']}"
        assert run["flow"] == "knowledge.ingest"
        assert (await front.ended(ann, run["id"]))["state"] == "succeeded"
    (document,) = await documents(ann)
    assert document["filename"] == "returns.md"
    assert document["state"] == "ready"
    assert document["run_id"] == run["id"]
    found = await ann.post(
        "/v1/knowledge-bases/shop/search", json={"query": "How long can I return a kettle?"}
    )
    assert found.status_code == 200
    (passage,) = found.json()["data"]
    assert "30 days" in passage["text"]
    assert passage["filename"] == "returns.md"
    (base,) = (await ann.get("/v1/knowledge-bases")).json()["data"]
    assert base["name"] == "shop"
    assert base["documents"] == 1


async def test_document_is_there_before_anybody_works_on_it(front: Front, ann: Client) -> None:
    run = (await upload(ann)).json()
    (document,) = await documents(ann)
    assert document["state"] == "pending"
    assert (await ann.get(f"/v1/runs/{run['id']}")).json()["state"] == "queued"


async def test_repeat_of_an_upload_stores_nothing(front: Front, ann: Client) -> None:
    first = await upload(ann, key="k1")
    again = await upload(ann, key="k1")
    assert again.status_code == 202
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    (document,) = await documents(ann)
    assert document["version"] == 1
    other = await upload(ann, b"# Something else\n", key="k1")
    assert other.status_code == 422
    assert other.json()["code"] == "idempotency_key_reused"


async def test_rival_uploads_with_one_key_make_one_run(front: Front, ann: Client) -> None:
    responses = await asyncio.gather(*(upload(ann, key="k1") for _ in range(6)))
    assert {response.status_code for response in responses} == {202}
    assert len({response.json()["id"] for response in responses}) == 1
    assert len((await ann.get("/v1/runs")).json()["data"]) == 1


@pytest.mark.parametrize(
    ("filename", "content", "status"),
    [
        ("a.exe", b"MZ", 422),
        ("../a.md", b"# a", 422),
        ("a.md", b"", 422),
        ("a.md", b"PK\x03\x04 zip", 422),
        ("", b"# a", 422),
        ("a" * 600 + ".md", b"# a", 422),
        ("a.md", b"x" * (20 * 1024 * 1024 + 1), 413),
    ],
)
async def test_upload_that_cannot_be_read_is_refused(
    front: Front, ann: Client, filename: str, content: bytes, status: int
) -> None:
    response = await upload(ann, content, filename=filename)
    assert response.status_code == status
    assert (await ann.get("/v1/runs")).json()["data"] == []


async def test_base_that_does_not_exist(front: Front, ann: Client) -> None:
    assert (await ann.get("/v1/knowledge-bases/shop/documents")).status_code == 404
    response = await ann.post("/v1/knowledge-bases/shop/search", json={"query": "x"})
    assert response.status_code == 404


async def test_name_of_a_base_is_checked(front: Front, ann: Client) -> None:
    response = await ann.post(
        "/v1/knowledge-bases/Not%20A%20Name/documents", params={"filename": "a.md"}, content=b"# a"
    )
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "name"


@pytest.mark.parametrize("body", [{}, {"query": ""}, {"query": "x", "limit": 0}, {"query": 7}])
async def test_question_is_checked(front: Front, ann: Client, body: dict[str, Any]) -> None:
    response = await ann.post("/v1/knowledge-bases/shop/search", json=body)
    assert response.status_code == 422
    assert response.json()["error"]["param"] in ("query", "limit")


async def test_base_of_another_org_does_not_exist(
    front: Front, ann: Client, other_org: int
) -> None:
    await upload(ann)
    stranger = await front.client(org_id=other_org)
    assert (await stranger.get("/v1/knowledge-bases/shop/documents")).status_code == 404
    assert (await stranger.get("/v1/knowledge-bases")).json()["data"] == []


async def test_reader_may_not_upload(front: Front) -> None:
    reader = await front.client(permissions=ALL - {"knowledge:write"})
    assert (await upload(reader)).status_code == 403


async def test_without_a_store_there_are_no_knowledge_routes(urls: Urls, db: Database) -> None:
    async with opened(urls, db) as app:
        paths = app.openapi()["paths"]
    assert "/v1/runs" in paths
    assert not any("knowledge" in path for path in paths)
