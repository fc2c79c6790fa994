"""The bundled embedder, really run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio

from millpond.models import Embedder, open_embedder


@pytest_asyncio.fixture
async def embedder() -> AsyncIterator[Embedder]:
    embedder = open_embedder("local")
    yield embedder
    await embedder.close()


def _cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


async def test_vectors_have_384_dimensions_and_length_one(embedder: Embedder) -> None:
    vectors = await embedder.embed(["a stove", "", "x" * 5000])
    assert [len(vector) for vector in vectors] == [384] * 3
    assert all(abs(_cosine(vector, vector) - 1) < 1e-5 for vector in vectors)
    assert await embedder.embed([]) == []


async def test_similar_meaning_is_closer_than_shared_words(embedder: Embedder) -> None:
    question, answer, decoy = await embedder.embed(
        [
            "Can I get my money back?",
            "Refunds are paid to the original card.",
            "Can I get my boots wet?",
        ]
    )
    assert _cosine(question, answer) > _cosine(question, decoy)


async def test_order_and_vectors_do_not_depend_on_the_batch(embedder: Embedder) -> None:
    texts = [f"sentence number {n} " + "and more words " * (n % 7) for n in range(23)]
    together = await embedder.embed(texts)
    for text, vector in zip(texts, together, strict=True):
        alone = (await embedder.embed([text]))[0]
        assert _cosine(alone, vector) > 0.999


async def test_the_event_loop_goes_on_meanwhile(embedder: Embedder) -> None:
    asked = asyncio.create_task(embedder.embed(["a long text of many words " * 40] * 24))
    ticks = 0
    while not asked.done():
        await asyncio.sleep(0.005)
        ticks += 1
    assert ticks > 10
    assert len(await asked) == 24


async def test_a_question_does_not_wait_for_a_whole_document(embedder: Embedder) -> None:
    ended: list[str] = []

    async def embed(name: str, texts: list[str]) -> None:
        await embedder.embed(texts)
        ended.append(name)

    document = asyncio.create_task(embed("document", ["a long text of many words " * 30] * 40))
    await asyncio.sleep(0)
    await embed("question", ["a short question"])
    assert ended == ["question"]
    await document
