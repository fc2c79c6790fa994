"""Limits that settings and code declare: what holds, what is above what, what goes when it is said no more."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from tests.engine.conftest import Pond

from millpond.db.pool import Database
from millpond.engine import ceilings
from millpond.engine.declared import Limit
from millpond.engine.declaring import SETTINGS, Change, Declaring, Wish, declare, wishes_of
from millpond.engine.registry import Registry, flow
from millpond.engine.rules import Rule
from millpond.errors import InvalidInput, NotFound
from millpond.types import NO_ORG

KEY = "provider:openai"


def rules(*limits: Limit) -> list[Rule]:
    return [ceilings.check_rule(rule) for limit in limits for rule in limit.rules]


async def say(
    db: Database, *limits: Limit, origin: str = SETTINGS, subject: str = "settings:here"
) -> list[Change]:
    """Declare limits of the settings, or of a flow."""
    source: Declaring = "settings" if origin == SETTINGS else "code"
    async with db.globals() as con:
        return await declare(
            con, source, [Wish(origin=origin, subject=subject, rules=rules(*limits))]
        )


async def set_limit(db: Database, key: str, maximum: int) -> None:
    rule = Rule(owner=NO_ORG, key=key, kind="concurrency", maximum=maximum)
    async with db.globals() as con:
        await ceilings.set_limit(con, NO_ORG, rule, "user:operator")


async def remove(db: Database, key: str) -> None:
    async with db.globals() as con:
        await ceilings.remove_limit(con, NO_ORG, key, "concurrency")


async def held(db: Database) -> dict[str, tuple[str, int, list[tuple[str, int]]]]:
    """Return source, maximum and what is below, of all that the platform limits at once."""
    async with db.globals() as con:
        found = await ceilings.list_platform_limits(con)
    return {
        one.rule.key: (
            one.source,
            one.rule.maximum,
            [(below.source, below.rule.maximum) for below in one.overrides],
        )
        for one in found
        if one.rule.kind == "concurrency"
    }


async def version(pond: Pond) -> int:
    async with pond.engine_db.duty("test") as con:
        found: int = await con.fetchval("select coalesce((select version from limit_version), 0)")
    return found


async def test_api_stands_above_settings_and_these_above_code(db: Database) -> None:
    await say(db, Limit(KEY, concurrency=3), origin="answer", subject="code:answer@1")
    assert await held(db) == {KEY: ("code", 3, [])}
    await say(db, Limit(KEY, concurrency=7))
    assert await held(db) == {KEY: ("settings", 7, [("code", 3)])}
    await set_limit(db, KEY, 9)
    assert await held(db) == {KEY: ("api", 9, [("settings", 7), ("code", 3)])}
    (change,) = await say(db, Limit(KEY, concurrency=8))
    assert (change.overridden_by, change.is_gone) == ("api", False)
    assert await held(db) == {KEY: ("api", 9, [("settings", 8), ("code", 3)])}
    await remove(db, KEY)
    assert await held(db) == {KEY: ("settings", 8, [("code", 3)])}
    (change,) = await say(db)
    assert (change.overridden_by, change.is_gone) == (None, True)
    assert await held(db) == {KEY: ("code", 3, [])}
    await say(db, origin="answer")
    assert await held(db) == {}


async def test_a_declared_limit_that_is_removed_comes_back_with_who_declares_it(
    db: Database,
) -> None:
    await say(db, Limit(KEY, concurrency=3), origin="gone", subject="code:gone@1")
    await say(db, Limit(KEY, concurrency=4))
    await remove(db, KEY)
    assert await held(db) == {KEY: ("code", 3, [])}
    await remove(db, KEY)
    assert await held(db) == {}
    with pytest.raises(NotFound):
        await remove(db, KEY)
    await say(db, Limit(KEY, concurrency=4))
    assert await held(db) == {KEY: ("settings", 4, [])}


async def test_an_origin_replaces_its_own_and_nothing_of_others(db: Database) -> None:
    await say(db, Limit("model:a", concurrency=1), Limit("model:b", concurrency=1), origin="answer")
    await say(db, Limit("model:c", concurrency=1), origin="route")
    await set_limit(db, "model:d", 1)
    await say(db, Limit("model:b", concurrency=2), origin="answer")
    assert {key: one[:2] for key, one in (await held(db)).items()} == {
        "model:b": ("code", 2),
        "model:c": ("code", 1),
        "model:d": ("api", 1),
    }


async def test_of_two_flows_that_disagree_the_last_to_say_so_holds(db: Database) -> None:
    await say(db, Limit(KEY, concurrency=3), origin="zebra", subject="code:zebra@1")
    await say(db, Limit(KEY, concurrency=5), origin="answer", subject="code:answer@1")
    assert await held(db) == {KEY: ("code", 5, [("code", 3)])}
    await say(db, Limit(KEY, concurrency=4), origin="zebra", subject="code:zebra@2")
    assert await held(db) == {KEY: ("code", 4, [("code", 5)])}
    await say(db, origin="zebra")
    assert await held(db) == {KEY: ("code", 5, [])}


async def test_saying_the_same_again_changes_nothing(pond: Pond) -> None:
    limits = Limit(KEY, concurrency=3, rate=600, burst=10), Limit("org:* x model:m", concurrency=1)
    assert len(await say(pond.db, *limits)) == 3
    before = await version(pond)
    assert before == 3
    assert await say(pond.db, *limits, subject="settings:another-host") == []
    assert await version(pond) == before
    async with pond.db.globals() as con:
        found = await ceilings.list_platform_limits(con)
    assert {one.set_by for one in found} == {"settings:here"}


async def test_what_is_below_another_tells_claims_nothing(pond: Pond) -> None:
    await set_limit(pond.db, KEY, 9)
    before = await version(pond)
    await say(pond.db, Limit(KEY, concurrency=3))
    assert await version(pond) == before


async def test_a_limit_of_an_org_waits_until_that_is_there(db: Database) -> None:
    slug = f"new-{uuid.uuid4().hex[:8]}"
    limits = Limit(f"org:{slug} x {KEY}", concurrency=2), Limit(KEY, concurrency=5)
    await say(db, *limits)
    assert list(await held(db)) == [KEY]
    async with db.globals() as con:
        await con.execute("insert into org (slug, name) values ($1, $1)", slug)
    (change,) = await say(db, *limits)
    assert change.rule.of_org is not None
    assert set(await held(db)) == {KEY, f"org:{slug}×{KEY}"}


async def test_many_hosts_that_start_at_once_and_an_operator_agree(db: Database) -> None:
    many = [Limit(f"model:m{nth}", concurrency=nth) for nth in range(1, 8)]
    for _ in range(5):
        await asyncio.gather(
            say(db, *many),
            say(db, *reversed(many)),
            say(db, *many[3:], origin="answer"),
            set_limit(db, "model:m4", 40),
            set_limit(db, "model:m2", 20),
        )
        found = {key: one[:2] for key, one in (await held(db)).items()}
        assert found == {
            f"model:m{nth}": ("api", nth * 10) if nth in (2, 4) else ("settings", nth)
            for nth in range(1, 8)
        }
        await asyncio.gather(say(db), say(db, origin="answer"), remove(db, "model:m2"))
        assert (await held(db)).keys() == {"model:m4"}
        await remove(db, "model:m4")


async def test_a_declared_limit_holds_from_the_next_claim_on(pond: Pond) -> None:
    begun: list[str] = []
    may_end = asyncio.Event()

    async def hold(_ctx: Any, name: str) -> None:
        begun.append(name)
        await may_end.wait()

    held_flow = pond.flow(hold, name="hold", limits=[Limit("flow:hold", concurrency=1)])
    free = pond.flow(hold, name="free")
    async with pond.db.globals() as con:
        await declare(con, "code", wishes_of([held_flow, free]))
    async with pond.worker({"default": 20}):
        first, second = [await pond.submit(held_flow, "held") for _ in range(2)]
        await pond.until(first, "run.started")
        await pond.until(await pond.submit(free, "free"), "run.started")
        assert begun == ["held", "free"]
        assert await pond.count("lease") == 2
        await say(pond.db, Limit("flow:hold", concurrency=2))
        pond.hints.wake(["*"])
        await pond.until(second, "run.started")
        may_end.set()
        await pond.ended(second)


def test_flows_declare_by_their_newest_version() -> None:
    registry = Registry()

    async def work(_ctx: Any, _: Any) -> None: ...

    def add(name: str, number: int, limits: Sequence[Limit]) -> None:
        flow(name, version=number, limits=limits, registry=registry)(work)

    add("answer", 10, [Limit(KEY, concurrency=4, rate=60)])
    add("answer", 9, [Limit(KEY, concurrency=5), Limit("model:old", concurrency=1)])
    add("route", 1, [Limit(KEY, concurrency=4)])
    add("plain", 1, [])
    found = {wish.origin: wish for wish in wishes_of(registry.flows.values())}
    assert {name: len(wish.rules) for name, wish in found.items()} == {
        "answer": 2,
        "route": 1,
        "plain": 0,
    }
    assert found["answer"].subject == "code:answer@10"
    add("route", 2, [Limit(KEY, concurrency=3)])
    with pytest.raises(InvalidInput, match="answer and route declare different concurrency limits"):
        wishes_of(registry.flows.values())


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: Limit("openai", concurrency=1), "no key of a limit"),
        (lambda: Limit(KEY), "neither `concurrency` nor `rate` nor `tokens`"),
        (lambda: Limit(KEY, concurrency=-1), "no count"),
        (lambda: Limit(KEY, rate=5, burst=0), "no count"),
        (lambda: Limit(KEY, rate=5, period_s=0), "above 0"),
        (
            lambda: flow("twice", limits=[Limit(KEY, rate=1), Limit(KEY, rate=2)])(_nothing),
            "twice declares a rate limit on provider:openai twice",
        ),
        (
            lambda: wishes_of(
                [flow("fast", limits=[Limit(KEY, rate=10**8)], registry=Registry())(_nothing)]
            ),
            "flow fast, its rate limit on provider:openai: maximum",
        ),
    ],
)
def test_code_that_declares_no_limit_is_told_so(made: Any, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as caught:
        made()
    assert caught.value.param in ("limits", "key")


async def _nothing(_ctx: Any, _: Any) -> None: ...


def test_tokens_are_declared_with_a_periods_worth_at_once() -> None:
    rate, tokens = Limit(KEY, rate=60, tokens=90_000).rules
    assert (rate.kind, rate.burst) == ("rate", 1)
    assert (tokens.kind, tokens.maximum, tokens.period_s, tokens.burst) == (
        "tokens",
        90_000,
        60.0,
        90_000,
    )
    (less,) = Limit(KEY, tokens=90_000, burst=500).rules
    assert less.burst == 500
