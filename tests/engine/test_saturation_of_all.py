"""How full things are over all orgs, for operators: how much there is, and nothing of what orgs hold."""

from __future__ import annotations

from tests.engine.conftest import Pond
from tests.engine.parking import KEY, Hand, send
from tests.engine.test_limits import limit, second_org
from tests.engine.test_sampling import begun, look

from millpond.engine.saturation import Saturation
from millpond.engine.saturation_of_all import Of, page_of_all


async def page(
    pond: Pond, of: Of | None = None, after: tuple[Of, str] | None = None, limit: int = 200
) -> tuple[list[Saturation], bool]:
    async with pond.db.globals() as con:
        return await page_of_all(con, of, after, limit)


async def slug(pond: Pond, org_id: int) -> str:
    async with pond.db.org(org_id) as con:
        found: str = await con.fetchval("select slug from org where org_id = $1", org_id)
    return found


async def test_queues_limits_and_orgs_are_told_with_what_waits_there(pond: Pond) -> None:
    hand = await Hand.register(pond)
    other, idle = await second_org(pond.db), await second_org(pond.db)
    await limit(pond.db, KEY, 2)
    await send(pond, 3)
    await send(pond, 2, org_id=other)
    assert len(await hand.soon()) == 2
    await look(pond, await begun(pond))
    found, has_more = await page(pond)
    rows = {(one.of, one.name): one for one in found}
    assert not has_more
    queue, key = rows["queue", "default"], rows["limit", KEY]
    assert (queue.maximum, queue.waiting, queue.orgs) == (8, 3, 2)
    assert (key.in_use, key.maximum, key.waiting, key.is_exact) == (2, 2, 3, True)
    assert key.oldest_s is not None
    assert key.is_starved(0.0)
    assert not key.is_starved(3600.0)
    assert (key.full.of_minute, key.keys) == (1.0, 1)
    orgs = [rows["org", await slug(pond, org_id)] for org_id in (pond.org_id, other)]
    assert sum(one.waiting for one in orgs) == 3
    assert sum(one.in_use or 0 for one in orgs) == 2
    assert [one.full.of_minute for one in orgs if one.waiting] == [1.0] * sum(
        one.waiting > 0 for one in orgs
    )
    assert ("org", await slug(pond, idle)) not in rows


async def test_keys_that_callers_gave_and_limits_of_orgs_are_not_told(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, "model:*", 1)
    await limit(pond.db, "org:* x provider:*", 1)
    await limit(pond.db, "integration:theirs", 1, org_id=pond.org_id)
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into flow_version (flow, version, queue, input_schema, keys)"
            " values ('echo', 1, 'default', '{}', array['model:declared'])"
        )
    for keys in (
        ["model:declared"],
        ["model:secret-one", "integration:theirs"],
        ["model:secret-two"],
        ["model:secret-two"],
        ["provider:secret-three"],
    ):
        await send(pond, 1, keys=keys)
    assert len(await hand.soon()) == 4
    found, _ = await page(pond)
    assert "secret" not in str(found)
    assert "theirs" not in str(found)
    rows = {one.name: one for one in found if one.of == "limit"}
    own = await slug(pond, pond.org_id)
    assert set(rows) == {"model:declared", "model:*", f"org:{own}×provider:*"}
    hidden = rows["model:*"]
    assert (hidden.keys, hidden.own, hidden.in_use, hidden.maximum, hidden.waiting) == (
        2,
        2,
        1,
        1,
        1,
    )


async def test_pages_go_on_where_the_last_one_ended(pond: Pond) -> None:
    hand = await Hand.register(pond, queues=("default", "sql"))
    await limit(pond.db, KEY, 1)
    await limit(pond.db, "org:*", 5)
    for org_id in (pond.org_id, await second_org(pond.db), await second_org(pond.db)):
        await send(pond, 1, org_id=org_id)
    await hand.soon()
    whole, has_more = await page(pond)
    assert not has_more
    seen: list[Saturation] = []
    after: tuple[Of, str] | None = None
    while True:
        found, has_more = await page(pond, after=after, limit=2)
        seen += found
        if not has_more:
            break
        last = found[-1]
        rule = last.rule
        name = last.name if rule is None else f"{rule.kind} {rule.key} {last.name}"
        after = (last.of, name)
    names = [(one.of, one.name) for one in whole]
    assert [(one.of, one.name) for one in seen] == names
    assert [of for of, _ in names] == sorted(
        (of for of, _ in names), key=["queue", "limit", "org"].index
    )
    of_orgs, _ = await page(pond, of="org")
    assert len(of_orgs) == 3


async def test_inside_an_org_nothing_of_all_is_told(pond: Pond) -> None:
    hand = await Hand.register(pond)
    await limit(pond.db, KEY, 1)
    await send(pond, 2)
    await hand.soon()
    async with pond.db.org(pond.org_id) as con:
        found, _ = await page_of_all(con, None, None, 200)
    (queue,) = found
    assert (queue.of, queue.waiting, queue.orgs) == ("queue", 0, 0)
