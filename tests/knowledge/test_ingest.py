"""Ingestion by its stages: versions, resuming, reasons."""

from __future__ import annotations

import uuid

import pytest

from knowledge.conftest import DOCUMENTS, Ingest, Upload
from millpond.db.pool import Database
from millpond.errors import Conflict, InvalidInput, NotFound
from millpond.knowledge import indexing
from millpond.knowledge.records import Document
from millpond.knowledge.store import KnowledgeStore

OLD = "# Boats\n\nA canoe may be kept for ten days.\n"
NEW = "# Boats\n\nA canoe may be kept for twenty weeks.\n\n# Oars\n\nOars float.\n"


async def _document(store: KnowledgeStore, org: int) -> Document:
    (document,) = await store.documents(org, "support")
    return document


async def test_upload_and_intent_share_the_callers_transaction(
    db: Database, store: KnowledgeStore, org: int
) -> None:
    with pytest.raises(RuntimeError, match="roll back"):
        async with db.org(org) as con:
            _, intent = await store.add_document(
                con, org, "support", "a.md", OLD.encode(), "user:1"
            )
            assert (intent.flow, intent.queue, intent.org_id) == ("knowledge.ingest", "index", org)
            raise RuntimeError("roll back")
    with pytest.raises(NotFound):
        await store.documents(org, "support")


async def test_document_becomes_ready_with_its_facts(
    store: KnowledgeStore, org: int, upload: Upload, ingest: Ingest
) -> None:
    document_id = await upload("boats/rules.md", OLD)
    before = await _document(store, org)
    assert (before.status, before.ready_version, before.title) == ("pending", None, "rules")
    done = await ingest(document_id)
    assert (done.outcome, done.chunks) == ("indexed", 1)
    after = await _document(store, org)
    assert (after.status, after.stage, after.progress, after.reason) == ("ready", None, 1.0, None)
    assert (after.title, after.version, after.ready_version) == ("Boats", 1, 1)
    assert (after.chunks, after.size_bytes) == (1, len(OLD.encode()))


async def test_every_stage_is_told_on_the_document(
    store: KnowledgeStore, org: int, upload: Upload
) -> None:
    document_id = await upload("a.md", OLD)
    source = await indexing.begin(store, org, document_id)
    seen = []
    await indexing.parse(store, org, source)
    seen.append(await _document(store, org))
    total = await indexing.chunk(store, org, source)
    seen.append(await _document(store, org))
    await indexing.embed(store, org, source, 0, total, total)
    seen.append(await _document(store, org))
    assert [document.stage for document in seen] == ["parse", "chunk", "embed"]
    assert {document.status for document in seen} == {"processing"}
    assert seen[0].progress < seen[1].progress < seen[2].progress < 1


async def test_same_bytes_again_change_nothing(
    db: Database, store: KnowledgeStore, org: int, upload: Upload, ingest: Ingest
) -> None:
    document_id = await upload("a.md", OLD)
    await ingest(document_id)
    first = await _document(store, org)
    assert await upload("a.md", OLD) == document_id
    again = await _document(store, org)
    assert (again.version, again.status, again.chunks) == (1, "ready", first.chunks)
    assert (await indexing.begin(store, org, document_id)).is_ready
    await ingest(document_id)
    async with db.org(org) as con:
        assert await con.fetchval("select count(*) from chunk") == first.chunks


async def test_stages_run_twice_or_out_of_a_crash_end_the_same(
    db: Database, store: KnowledgeStore, org: int, upload: Upload
) -> None:
    text = "\n\n".join(
        f"# Part {n}\n\nWords about part {n}. " + "More words. " * 40 for n in range(9)
    )
    document_id = await upload("a.md", text)
    source = await indexing.begin(store, org, document_id)
    await indexing.parse(store, org, source)
    total = await indexing.chunk(store, org, source)
    await indexing.parse(store, org, source)
    assert await indexing.chunk(store, org, source) == total
    assert await indexing.embed(store, org, source, 0, 4, total) == 4
    with pytest.raises(Exception, match="have no vector"):
        await indexing.publish(store, org, source)
    assert await indexing.embed(store, org, source, 0, 4, total) == 0
    assert await indexing.embed(store, org, source, 4, total, total) == total - 4
    for _ in range(2):
        assert (await indexing.publish(store, org, source)).chunks == total
    async with db.org(org) as con:
        assert await con.fetchval("select count(*) from chunk") == total


async def test_new_version_replaces_the_old_one_only_when_it_is_ready(
    db: Database, store: KnowledgeStore, org: int, upload: Upload, ingest: Ingest
) -> None:
    document_id = await upload("a.md", OLD)
    await ingest(document_id)
    assert await upload("a.md", NEW) == document_id
    question = "How long may a canoe be kept?"
    meanwhile = await store.search(org, "support", question)
    assert [(p.version, "ten days" in p.text) for p in meanwhile.passages] == [(1, True)]
    pending = await _document(store, org)
    assert (pending.version, pending.ready_version, pending.status) == (2, 1, "pending")
    source = await indexing.begin(store, org, document_id)
    await indexing.parse(store, org, source)
    total = await indexing.chunk(store, org, source)
    still = await store.search(org, "support", question)
    assert {p.version for p in still.passages} == {1}
    await indexing.embed(store, org, source, 0, total, total)
    await indexing.publish(store, org, source)
    now = await store.search(org, "support", question)
    assert {p.version for p in now.passages} == {2}
    assert "twenty weeks" in now.passages[0].text
    async with db.org(org) as con:
        for table in ("chunk", "document_text", "document_content"):
            assert await con.fetchval(f"select max(version) = min(version) from {table}")


async def test_run_of_an_older_version_is_superseded_and_leaves_no_trace(
    db: Database, store: KnowledgeStore, org: int, upload: Upload, ingest: Ingest
) -> None:
    document_id = await upload("a.md", OLD)
    old = await indexing.begin(store, org, document_id)
    await indexing.parse(store, org, old)
    total = await indexing.chunk(store, org, old)
    await upload("a.md", NEW)
    await ingest(document_id)
    await indexing.embed(store, org, old, 0, total, total)
    assert (await indexing.publish(store, org, old)).outcome == "superseded"
    assert not await indexing.fail(store, org, document_id, old.version, "too late")
    document = await _document(store, org)
    assert (document.status, document.ready_version) == ("ready", 2)
    async with db.org(org) as con:
        assert await con.fetchval("select min(version) from chunk") == 2


async def test_failure_is_told_and_the_ready_version_stays_searchable(
    store: KnowledgeStore, org: int, upload: Upload, ingest: Ingest
) -> None:
    document_id = await upload("a.html", "<p>A canoe may be kept for ten days.</p>")
    await ingest(document_id)
    await upload("a.html", "<script>nothing()</script>")
    source = await indexing.begin(store, org, document_id)
    with pytest.raises(InvalidInput) as caught:
        await indexing.parse(store, org, source)
    assert await indexing.fail(store, org, document_id, source.version, caught.value.message)
    document = await _document(store, org)
    assert (document.status, document.ready_version) == ("failed", 1)
    assert document.reason is not None
    assert "no text" in document.reason
    found = await store.search(org, "support", "How long may a canoe be kept?")
    assert found.has_answer
    assert await upload("a.html", "<p>A canoe may be kept for two days.</p>") == document_id
    await ingest(document_id)
    mended = await _document(store, org)
    assert (mended.status, mended.reason, mended.ready_version) == ("ready", None, 3)


async def test_document_whose_run_was_cancelled_is_not_pending_for_ever(
    db: Database, store: KnowledgeStore, org: int, upload: Upload
) -> None:
    await upload("a.md", OLD)
    run_id = (await _document(store, org)).run_id
    async with db.org(org) as con:
        await con.execute(
            "insert into run (org_id, run_id, flow, version, queue, subject, input) "
            "values ($1, $2, 'knowledge.ingest', 1, 'index', 'user:1', '{}')",
            org,
            run_id,
        )
        await con.execute(
            "update run set outcome = 'cancelled', finished_at = clock_timestamp() where run_id = $1",
            run_id,
        )
    document = await _document(store, org)
    assert document.status == "failed"
    assert document.reason is not None
    assert "cancelled" in document.reason


async def test_removed_document_is_gone_from_search_and_tables(
    db: Database, store: KnowledgeStore, org: int, upload: Upload, ingest: Ingest
) -> None:
    document_id = await upload("a.md", OLD)
    await ingest(document_id)
    await store.remove_document(org, document_id)
    assert not (await store.search(org, "support", "canoe ten days")).passages
    async with db.org(org) as con:
        for table in ("document", "document_content", "document_text", "chunk"):
            assert await con.fetchval(f"select count(*) from {table}") == 0
    with pytest.raises(NotFound):
        await store.remove_document(org, document_id)
    with pytest.raises(NotFound):
        await indexing.begin(store, org, document_id)


async def test_base_keeps_its_embedder(
    db: Database, store: KnowledgeStore, org: int, upload: Upload
) -> None:
    class Other:
        name = "other:model"
        dimensions = 384
        embed = store.embedder.embed
        close = store.embedder.close

    document_id = await upload("a.md", OLD)
    other = KnowledgeStore(db, Other())
    with pytest.raises(Conflict):
        await other.search(org, "support", "canoe")
    with pytest.raises(Conflict):
        await indexing.begin(other, org, document_id)
    with pytest.raises(Conflict):
        async with db.org(org) as con:
            await other.add_document(con, org, "support", "b.md", b"# B", "user:1")


async def test_both_shipped_documents_are_cut_into_exact_spans(
    db: Database, store: KnowledgeStore, org: int, upload: Upload, ingest: Ingest
) -> None:
    for name in ("returns-policy.md", "ember-2-manual.pdf"):
        await ingest(await upload(name, (DOCUMENTS / name).read_bytes()))
    async with db.org(org) as con:
        rows = await con.fetch(
            "select c.start_char, c.end_char, c.text, t.text as whole from chunk c "
            "join document_text t using (org_id, document_id, version)"
        )
    assert len(rows) > 20
    for row in rows:
        assert row["whole"][row["start_char"] : row["end_char"]] == row["text"]


@pytest.mark.parametrize("name", ["", "Support", "a b", "-a", "a" * 64])
async def test_base_names_are_checked(store: KnowledgeStore, org: int, name: str) -> None:
    with pytest.raises(InvalidInput):
        await store.create_base(org, name)


async def test_creating_a_base_twice_returns_the_first(store: KnowledgeStore, org: int) -> None:
    first = await store.create_base(org, "support")
    assert await store.create_base(org, "support") == first
    assert [(base.name, base.documents) for base in await store.bases(org)] == [("support", 0)]


async def test_citation_of_what_is_not_there_is_refused(
    store: KnowledgeStore, org: int, upload: Upload, ingest: Ingest
) -> None:
    document_id = await upload("a.md", OLD)
    await ingest(document_id)
    assert await store.cite(org, document_id, 1, 2, 7) == "Boats"
    for version, start, end in ((1, 0, 10_000), (2, 0, 5), (1, 5, 5)):
        with pytest.raises(NotFound):
            await store.cite(org, document_id, version, start, end)
    with pytest.raises(NotFound):
        await store.cite(org, uuid.uuid4(), 1, 0, 1)
