"""Two orgs do marked work on real processes; nothing of one is found in anything that the other can read.

What each leaves is found in its own answers first, so that not finding it elsewhere proves something.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from tests.cli.conftest import Up, make_folder, run_command
from tests.cli.founding import found
from tests.security.canaries import Marked, client_of, found_in, founded_org, leave_marks
from tests.security.test_matrix import DOCUMENT, PLACES

from millpond.cli.running import find_running
from millpond.engine.hints import CANCELLED, CHANGED, SUMMONED, WAKE

# What the API takes and gives back to nobody, or to its maker alone.
UNREAD = {"misfit", "dedup", "eventid"}
ANIMALS = ("heron", "otter")


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    """A platform of its own, with two workers."""
    made = make_folder()
    running = Up.start(made / "data", flows="tests.security.canary_flows", MILLPOND_PROCESSES="2")
    try:
        yield running
    finally:
        running.destroy()
        shutil.rmtree(made, ignore_errors=True)


def routes(*methods: str) -> list[tuple[str, str]]:
    return [
        (method.upper(), path)
        for path, operations in DOCUMENT["paths"].items()
        for method in operations
        if method in methods
    ]


def filled(path: str, ids: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Return a path with every id there is for its places, and what it then names."""
    names = PLACES.findall(path)
    made = []
    for choice in itertools.product(*(ids.get(name, ["never-made"]) for name in names)):
        place = path
        for name, one in zip(names, choice, strict=True):
            place = place.replace(f"{{{name}}}", one)
        made.append((place, list(choice)))
    return made


async def read_all(org: Marked, other: Marked) -> AsyncIterator[tuple[str, str]]:
    """Yield everything that an org can read: every GET route on its own things and on the other's, and streams."""
    for _, path in routes("get"):
        for place, named in [*filled(path, org.ids), *filled(path, other.ids)]:
            async with contextlib.aclosing(pages(org, place)) as answers:
                async for text in answers:
                    yield place, without(text, named)
    for run in [*org.ids["run_id"], *other.ids["run_id"]]:
        yield f"stream of {run}", without(await streamed(org, run), [run])
    place = f"/v1/knowledge-bases/{org.word('base')}/search"
    yield place, str(await org.sent("POST", place, json={"query": "What is a kettle?"}))


async def pages(org: Marked, place: str) -> AsyncIterator[str]:
    """Yield the answers of a list, page after page, or the one answer."""
    params: dict[str, Any] = {}
    while True:
        answer = await org.client.get(place, params=params)
        assert answer.status_code < 500, f"{place}: {answer.text}"
        yield answer.text + str(answer.headers)
        try:
            document = answer.json()
        except ValueError:
            return
        if not isinstance(document, dict) or not document.get("has_more"):
            return
        params = {"after": document.get("last_id") or document["data"][-1]["id"]}


async def streamed(org: Marked, run: str) -> str:
    """Follow a run for as long as it says something at once."""
    said: list[str] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.5), org.client.sse(f"/v1/runs/{run}/events") as source:
            if source.response.is_error:
                await source.response.aread()
                return source.response.text
            async for message in source:
                said.append(f"{message.event} {message.data}")
    return "\n".join(said)


def without(text: str, named: list[str]) -> str:
    """Take out what the request itself named."""
    for word in named:
        text = text.replace(word, "")
    return text


async def tried(org: Marked, other: Marked) -> AsyncIterator[tuple[str, str]]:
    """Yield the answers to everything that changes something, asked of the other's things, and to odd requests."""
    for method, path in routes("post", "put", "patch", "delete"):
        if PLACES.search(path) is None:
            continue
        for place, named in filled(path, other.ids):
            answer = await org.client.request(method, place, json={})
            assert answer.status_code < 500, f"{method} {place}: {answer.text}"
            yield f"{method} {place}", without(answer.text, named)
    for word in other.words.values():
        for path, params in (
            ("/v1/runs", {"q": word}),
            ("/v1/runs", {"label": f"place={word}"}),
            ("/v1/schedules", {"name": word}),
            ("/v1/triggers", {"name": word}),
            ("/v1/events", {"name": word}),
            ("/v1/members", {"email": f"{word}@x.example"}),
        ):
            answer = await org.client.get(path, params=params)
            assert answer.status_code == 200, answer.text
            assert answer.json()["data"] == [], f"{path} {params}"
    asked = {"query": f"A kettle is {other.word('document')}"}
    base = org.word("base")
    answer = await org.client.post(f"/v1/knowledge-bases/{base}/search", json=asked)
    assert answer.status_code == 200, answer.text
    yield "search", without(answer.text, [asked["query"]])
    for header in (*other.ids["org_id"], other.word("slug")):
        answer = await org.client.get("/v1/runs", headers={"X-Organization-Id": header})
        assert answer.status_code == 403
        yield "another's header", without(answer.text, [header])


@contextlib.asynccontextmanager
async def heard(up: Up) -> AsyncIterator[list[str]]:
    """Listen on every channel of the database, as whoever has a connection may."""
    running = find_running(up.data_dir)
    assert running is not None
    con = await asyncpg.connect(running.databases.app)
    payloads: list[str] = []
    try:
        for channel in (WAKE, CHANGED, CANCELLED, SUMMONED):
            await con.add_listener(channel, lambda *said: payloads.append(str(said[-1])))
        yield payloads
    finally:
        await con.close()


def logs(up: Up) -> Iterator[tuple[str, str]]:
    """Yield what API, workers, and the database's server wrote down."""
    yield up.log.name, up.log.read_text(encoding="utf-8", errors="replace")
    for path in up.data_dir.rglob("*.log*"):
        if path.is_file():
            yield path.name, path.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def orgs(up: Up) -> list[Marked]:
    """Two orgs with their owners; the commands that found a platform have a loop of their own."""
    operator, _ = found(up, run_command)
    return [founded_org(up, operator, animal) for animal in ANIMALS]


async def test_nothing_of_one_org_is_found_in_what_the_other_can_read_nor_in_logs(
    up: Up, orgs: list[Marked]
) -> None:
    async with heard(up) as payloads, contextlib.AsyncExitStack() as closing:
        for org in orgs:
            await closing.enter_async_context(org.client)
        await asyncio.gather(*(leave_marks(up, org, "op@pond.example") for org in orgs))
        for org, other in (orgs, orgs[::-1]):
            seen: set[str] = set()
            async for place, text in read_all(org, other):
                assert found_in(text, other.words.values()) == [], f"{org.animal} at {place}"
                seen.update(found_in(text, org.words.values()))
            unseen = {what for what, word in org.words.items() if word not in seen}
            assert unseen <= UNREAD, "nothing shows these to their own org: they prove nothing"
            async for place, text in tried(org, other):
                assert found_in(text, other.words.values()) == [], f"{org.animal} at {place}"
        words = [word for org in orgs for word in org.words.values()]
        async with client_of(up.url, "") as nobody:
            for _, path in routes("get"):
                for place, named in filled(path, orgs[0].ids):
                    answer = await nobody.get(place, headers={"Authorization": ""})
                    assert found_in(without(answer.text, named), words) == [], place
        assert len(payloads) > 10
        assert found_in("\n".join(payloads), words) == []
    assert up.stop() == 0
    written = list(logs(up))
    assert len(written) >= 2
    assert written[0][1]
    for name, text in written:
        assert found_in(text, words) == [], name
