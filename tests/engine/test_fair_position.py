"""The place in the fair order over all orgs, on a real database: what claims then do, and nothing of who others are."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import Hand, end, hold
from tests.engine.test_limits import second_org

from millpond.db.queries import queries
from millpond.engine.submit import submit
from millpond.engine.why import MAX_AHEAD, Reason, explain

COSTS = {"echo@1": 1.0, "slow@1": 3.0}


async def hand_of(pond: Pond, costs: dict[str, float] = COSTS) -> Hand:
    """Stand for a worker that has told how long its work takes, with all slots in use."""
    estimate_s: Callable[[str], float] = costs.__getitem__
    hand = await Hand.register(pond, *costs, estimate_s=estimate_s)
    told = ", ".join(f'"{able}": {cost_s}' for able, cost_s in costs.items())
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update worker set in_use = '{\"default\": 8}', told = $1",
            f'{{"took_s": {{{told}}}}}',
        )
    return hand


async def place(pond: Pond, org_id: int, run_id: uuid.UUID) -> Reason:
    async with pond.db.org(org_id) as con:
        found = await explain(con, org_id, run_id)
    (reason,) = [one for one in found.reasons if one.kind == "in_line"]
    return reason


async def send(pond: Pond, org_id: int, count: int, **options: object) -> list[uuid.UUID]:
    intents = [
        pond.intent(
            str(options.get("flow", "echo")),
            org_id=org_id,
            **{k: v for k, v in options.items() if k != "flow"},
        )
        for _ in range(count)
    ]
    async with pond.db.org(org_id) as con:
        await submit(con, intents)
    return [one.run_id for one in intents]


async def positions(pond: Pond, sent: dict[int, list[uuid.UUID]]) -> dict[uuid.UUID, int]:
    return {
        run_id: (await place(pond, org_id, run_id)).facts["ahead_of_all"]
        for org_id, runs in sent.items()
        for run_id in runs
    }


async def go_one_by_one(hand: Hand, pond: Pond, count: int) -> list[uuid.UUID]:
    went: list[uuid.UUID] = []
    while len(went) < count:
        claimed = await hand.claim({"default": 1})
        assert claimed, "work stands still"
        went += [one.lease.item_id for one in claimed]
        await end(pond, claimed)
    return went


@pytest.mark.parametrize("claimed_before", [0, 5], ids=["arrivals", "lanes"])
async def test_positions_are_the_order_in_which_claims_take_work_one_at_a_time(
    pond: Pond, claimed_before: int
) -> None:
    hand = await hand_of(pond)
    one, two, three = pond.org_id, await second_org(pond.db), await second_org(pond.db)
    sent = {
        one: [
            *await send(pond, one, 6),
            *await send(pond, one, 2, flow="slow"),
            *await send(pond, one, 2, priority=50),
        ],
        two: [*await send(pond, two, 5, flow="slow"), *await send(pond, two, 3)],
        three: await send(pond, three, 4, keys=["model:mini"]),
    }
    went = await go_one_by_one(hand, pond, claimed_before)
    sent = {org_id: [run for run in runs if run not in went] for org_id, runs in sent.items()}
    told = await positions(pond, sent)
    assert sorted(told.values()) == list(range(len(told)))
    order = await go_one_by_one(hand, pond, len(told))
    assert [told[run_id] for run_id in order] == list(range(len(told)))


async def test_the_place_in_the_orgs_own_line_counts_all_its_lanes(pond: Pond) -> None:
    await hand_of(pond)
    other = await second_org(pond.db)
    await send(pond, pond.org_id, 3)
    await send(pond, pond.org_id, 2, keys=["model:mini"])
    (last,) = await send(pond, pond.org_id, 1)
    await send(pond, other, 4)
    facts = (await place(pond, pond.org_id, last)).facts
    assert (facts["ahead"], facts["ahead_of_org"]) == (3, 5)
    # One of the other's costs as much as one of its own: they take turns.
    assert facts["ahead_of_all"] == 9
    assert facts["is_order_exact"]


async def test_a_position_is_exact_up_to_a_thousand(pond: Pond) -> None:
    await hand_of(pond)
    other = await second_org(pond.db)
    runs = await send(pond, pond.org_id, 502)
    await send(pond, other, 2000)
    found = {nth: (await place(pond, pond.org_id, runs[nth])).facts for nth in (499, 500, 501)}
    first = pond.org_id < other
    assert found[499]["ahead_of_all"] == 499 + (499 if first else 500)
    assert found[500]["ahead_of_all"] == 1000
    assert found[500]["is_order_exact"] == first
    assert (found[501]["ahead_of_all"], found[501]["is_order_exact"]) == (1000, False)
    assert found[501]["ahead_of_org"] == 501


async def test_paused_work_and_work_that_nobody_can_do_goes_before_nobody(pond: Pond) -> None:
    await hand_of(pond)
    other, paused = await second_org(pond.db), await second_org(pond.db)
    await send(pond, other, 3, flow="nobodys")
    await send(pond, paused, 3)
    await hold(pond, paused)
    runs = await send(pond, pond.org_id, 3)
    assert (await place(pond, pond.org_id, runs[2])).facts["ahead_of_all"] == 2


async def test_an_org_that_was_charged_more_stands_behind_and_without_credit_for_idle_time(
    pond: Pond,
) -> None:
    await hand_of(pond)
    other = await second_org(pond.db)
    async with pond.engine_db.duty("test") as con:
        await con.execute("insert into fair_clock (queue, virtual_s) values ('default', 10)")
        for org_id, virtual_s in ((pond.org_id, 12.0), (other, 2.0)):
            await con.execute(
                "insert into share (org_id, queue, virtual_s) values ($1, 'default', $2)",
                *(org_id, virtual_s),
            )
    (run_id,) = await send(pond, pond.org_id, 1)
    await send(pond, other, 9)
    # The other starts at the clock, not at 2: at 10 and 11, and at 12 if it goes first there.
    facts = (await place(pond, pond.org_id, run_id)).facts
    assert facts["ahead_of_all"] == (2 if pond.org_id < other else 3)


async def test_nothing_tells_who_the_others_are(pond: Pond) -> None:
    await hand_of(pond)
    other = await second_org(pond.db)
    await send(pond, other, 3, keys=["model:theirs"])
    (run_id,) = await send(pond, pond.org_id, 1)
    line = queries("why")["line"]
    given = ("default", 1, 1, run_id, list(COSTS), list(COSTS.values()), MAX_AHEAD)
    async with pond.db.org(pond.org_id) as con:
        rows = await con.fetch(line, *given)
        assert [set(row.keys()) for row in rows] == [
            {"weight", "virtual_s", "goes_first", "ahead"} for _ in rows
        ]
    async with pond.db.globals() as con:
        assert await con.fetch(line, *given) == []
    reason = await place(pond, pond.org_id, run_id)
    assert "theirs" not in str(reason)
