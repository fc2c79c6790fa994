"""Requests per second: shared by all API processes, told in headers, refused with 429."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise

import asyncpg
import pytest
from tests.api.test_quotas import admin, limit
from tests.security.conftest import World, world

from millpond.api.rates import RateLimited, Rates
from millpond.types import Principal

from .conftest import Client, Front, opened, served

__all__ = ["admin", "world"]


# So long a pause between answers shows a machine that is busy with others: the bucket may have run over meanwhile.
PAUSE_S = 0.25


@dataclass(frozen=True)
class Heard:
    """An answer: when it was asked for and when it came, and what it was."""

    asked_s: float
    came_s: float
    status: int


async def _hammer(client: Client, url: str, seconds: float, heard: list[Heard]) -> None:
    """Ask again and again for so long, and until somebody was refused."""
    until = time.monotonic() + seconds
    while time.monotonic() < until or all(one.status == 200 for one in heard):
        asked_s = time.monotonic()
        answer = await client.get(f"{url}/v1/flows")
        heard.append(Heard(asked_s, time.monotonic(), answer.status_code))


async def test_processes_together_let_through_what_the_bucket_holds_and_what_flows_in(
    front: Front, ann: Client, admin: asyncpg.Connection
) -> None:
    per_s = 20
    await limit(admin, front, requests_per_s=per_s)
    heard: list[Heard] = []
    async with opened(front.urls, front.db) as app, served(app) as url, asyncio.timeout(60):
        began = time.monotonic()
        await asyncio.gather(
            *(_hammer(ann, one, 2.0, heard) for one in (front.url, url) for _ in range(4))
        )
        took_s = time.monotonic() - began
    let_through = sum(one.status == 200 for one in heard)
    assert {one.status for one in heard} == {200, 429}
    assert let_through <= per_s + per_s * took_s + 1
    # As the last was refused the bucket was empty, and each had at most a quarter of it in hand. What flowed in until
    # then, but for what may have run over in pauses, was let through.
    refused_s = max(one.asked_s for one in heard if one.status == 429)
    came = sorted(one.came_s for one in heard if one.came_s <= refused_s)
    pauses = [b - a for a, b in pairwise([*came, refused_s]) if b - a > PAUSE_S]
    flowed_s = refused_s - came[0] - sum(pauses)
    in_hand = 2 * (per_s // 4 + 1)
    assert let_through >= per_s + per_s * flowed_s - in_hand * (1 + len(pauses))


async def test_a_refusal_says_when_to_come_again_and_then_lets_through(
    front: Front, ann: Client, admin: asyncpg.Connection
) -> None:
    await limit(admin, front, requests_per_s=2)
    first = await ann.get("/v1/flows")
    assert first.headers["RateLimit-Policy"] == '"org";q=2;w=1'
    assert first.headers["RateLimit"] == '"org";r=1;t=1'
    answers = [await ann.get("/v1/flows") for _ in range(4)]
    refused = next(one for one in answers if one.status_code == 429)
    assert refused.json()["code"] == "rate_limited"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.headers["RateLimit"].startswith('"org";r=0;t=')
    assert int(refused.headers["Retry-After"]) == 1
    async with asyncio.timeout(5):
        while (await ann.get("/v1/flows")).status_code == 429:
            await asyncio.sleep(0.05)


async def test_a_key_has_its_own_rate_within_that_of_its_org(
    front: Front, admin: asyncpg.Connection
) -> None:
    await limit(admin, front, requests_per_s=100, key_requests_per_s=3)
    keys = [f"key:0199aaaa-0000-7000-8000-00000000000{n}" for n in range(2)]
    one, two = [await front.client(subject=key) for key in keys]
    person = await front.client(subject="user:ann")
    seen = [(await one.get("/v1/flows")).status_code for _ in range(8)]
    assert 3 <= seen.count(200) < 8
    answer = await two.get("/v1/flows")
    assert answer.status_code == 200
    assert answer.headers["RateLimit-Policy"] == '"key";q=3;w=1, "org";q=100;w=1'
    answer = await person.get("/v1/flows")
    assert answer.headers["RateLimit-Policy"] == '"org";q=100;w=1'


async def test_a_real_keys_rate_is_its_own_whoever_made_it(
    world: World, admin: asyncpg.Connection
) -> None:
    """Two keys of one person: each has its rate, one that was used up slows neither the other nor the person."""
    person = await world.member("owner")
    boss = await world.client(person)
    keys = []
    for name in ("one", "two"):
        made = await boss.post("/v1/api-keys", json={"name": name, "scopes": ["flows:read"]})
        assert made.json()["key"].startswith("mpk_")
        keys.append(await world.front.client(token=made.json()["key"]))
    one, two = keys
    await limit(admin, world.front, requests_per_s=100, key_requests_per_s=3)
    seen = [await one.get("/v1/flows") for _ in range(8)]
    assert 3 <= [answer.status_code for answer in seen].count(200) < 8
    refused = next(answer for answer in seen if answer.status_code == 429)
    assert refused.headers["RateLimit"].startswith('"key";r=0;t=')
    for other, policy in ((two, '"key";q=3;w=1, "org";q=100;w=1'), (boss, '"org";q=100;w=1')):
        answer = await other.get("/v1/flows")
        assert (answer.status_code, answer.headers["RateLimit-Policy"]) == (200, policy)


async def test_who_is_not_limited_gets_no_headers(front: Front, ann: Client) -> None:
    answer = await ann.get("/v1/flows")
    assert answer.status_code == 200
    assert "RateLimit" not in answer.headers


async def test_another_org_is_not_slowed(
    front: Front, ann: Client, other_org: int, admin: asyncpg.Connection
) -> None:
    await limit(admin, front, requests_per_s=1)
    other = await front.client(org_id=other_org)
    for _ in range(10):
        await ann.get("/v1/flows")
        assert (await other.get("/v1/flows")).status_code == 200


@pytest.mark.parametrize("per_s", [0.5, 50.0])
async def test_requests_that_come_together_ask_the_database_together(
    front: Front, admin: asyncpg.Connection, per_s: float
) -> None:
    rates = Rates(front.db)
    who = Principal(org_id=front.org_id, subject="user:ann")
    asked = [rates.admit(who, {"requests_per_s": per_s}) for _ in range(200)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    refused = [one for one in results if isinstance(one, RateLimited)]
    assert len(results) - len(refused) == max(1, int(per_s))
    assert len(refused) + max(1, int(per_s)) == 200
    wish_s = refused[0].retry_after_s
    assert wish_s is not None
    assert wish_s <= 1 / per_s + 0.1


async def test_who_waits_while_the_rate_changes_is_answered(front: Front) -> None:
    rates = Rates(front.db)
    who = Principal(org_id=front.org_id, subject="user:ann")
    async with asyncio.timeout(10):
        asked = (rates.admit(who, {"requests_per_s": per_s}) for per_s in (5.0, 7.0))
        headers = await asyncio.gather(*asked)
    assert [dict(one)[b"ratelimit-policy"] for one in headers] == [b'"org";q=7;w=1'] * 2


async def test_a_raised_rate_holds_at_once(front: Front) -> None:
    rates = Rates(front.db)
    who = Principal(org_id=front.org_id, subject="user:ann")
    assert await rates.admit(who, {"requests_per_s": 0.01})
    with pytest.raises(RateLimited):  # for a hundred seconds
        await rates.admit(who, {"requests_per_s": 0.01})
    async with asyncio.timeout(10):
        while True:
            try:
                assert await rates.admit(who, {"requests_per_s": 100.0})
                break
            except RateLimited:
                await asyncio.sleep(0.02)


async def test_an_error_of_any_kind_reaches_whoever_waits(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next request is asked for again."""

    async def fail(*_: object) -> None:
        raise RuntimeError("something that nobody thought of")

    rates = Rates(front.db)
    who = Principal(org_id=front.org_id, subject="user:ann")
    asked = [asyncio.create_task(rates.admit(who, {"requests_per_s": 5.0})) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr("millpond.api.rates._take_all", fail)
        done, _ = await asyncio.wait(asked, timeout=5)
    assert [type(one.exception()) for one in done] == [RuntimeError] * 3
    async with asyncio.timeout(5):
        assert await rates.admit(who, {"requests_per_s": 5.0})


async def test_who_waits_is_cancelled_with_the_asking(
    front: Front, admin: asyncpg.Connection
) -> None:
    rates = Rates(front.db)
    who = Principal(org_id=front.org_id, subject="user:ann")
    async with admin.transaction():
        await admin.execute("lock table rate_bucket")
        asked = asyncio.create_task(rates.admit(who, {"requests_per_s": 5.0}))
        async with asyncio.timeout(10):
            while not await admin.fetchval("select count(*) from pg_locks where not granted"):
                await asyncio.sleep(0.01)
            (asking,) = [one for one in asyncio.all_tasks() if one.get_name() == "rates"]
            asking.cancel()
        done, _ = await asyncio.wait([asked], timeout=5)
    assert done == {asked}
    assert asked.cancelled()
