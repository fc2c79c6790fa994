"""Small work of many orgs: claims take an org's next few at one turn, read fewer orgs then, and leave nobody out."""

from __future__ import annotations

from collections import Counter

from tests.engine.conftest import Pond
from tests.engine.parking import Hand
from tests.engine.test_limits import second_org

from millpond.engine.submit import submit

SMALL_S, LONG_S = 0.0001, 0.02


async def _orgs(pond: Pond, counts: list[int]) -> list[int]:
    """Let orgs have so many runs waiting each; returns their ids in the order in which they stand."""
    orgs = sorted([pond.org_id, *[await second_org(pond.db) for _ in counts[1:]]])
    for org_id, count in zip(orgs, counts, strict=True):
        async with pond.db.org(org_id) as con:
            await submit(con, [pond.intent("echo", None, org_id=org_id) for _ in range(count)])
    return orgs


async def _claims(hand: Hand, slots: int) -> list[Counter[int]]:
    """Claim for so many slots as long as something comes, or there is more."""
    found: list[Counter[int]] = []
    while True:
        claimed = await hand.claim({"default": slots})
        if not claimed and not hand.has_more:
            return found
        found.append(Counter(one.lease.org_id for one in claimed))


async def test_small_runs_of_an_org_are_claimed_at_one_turn(pond: Pond) -> None:
    orgs = await _orgs(pond, [3] * 12)
    hand = await Hand.register(pond, estimate_s=lambda _: SMALL_S)
    found = await _claims(hand, 6)
    assert found == [Counter({orgs[n]: 3, orgs[n + 1]: 3}) for n in range(0, 12, 2)]


async def test_long_runs_of_orgs_are_claimed_one_by_one(pond: Pond) -> None:
    orgs = await _orgs(pond, [2] * 6)
    hand = await Hand.register(pond, estimate_s=lambda _: LONG_S)
    assert await _claims(hand, 6) == [Counter(orgs), Counter(orgs)]


async def test_slots_are_filled_though_orgs_behind_those_that_were_read_have_less_each(
    pond: Pond,
) -> None:
    """A claim that fell short says that there is more, and the next one reads as many orgs as it has slots."""
    orgs = await _orgs(pond, [8] * 2 + [1] * 22)
    hand = await Hand.register(pond, estimate_s=lambda _: SMALL_S)
    found = [await hand.claim({"default": 12}), await hand.claim({"default": 12})]
    assert [Counter(one.lease.org_id for one in claimed) for claimed in found] == [
        Counter({orgs[0]: 8, orgs[1]: 4}),
        Counter(orgs[2:7]),
    ]
    assert hand.has_more
    rest = await _claims(hand, 12)
    assert sum(rest, Counter()) == Counter({orgs[1]: 4} | dict.fromkeys(orgs[7:], 1))
    assert [sum(one.values()) for one in rest] == [12, 9]


async def test_a_claim_that_falls_short_tells_the_next_one_how_few_orgs_it_needs(
    pond: Pond,
) -> None:
    """Then less is read than there are slots: what is short again is claimed with what is free by then."""
    orgs = await _orgs(pond, [8] * 2 + [2] * 6 + [1] * 22)
    hand = await Hand.register(pond, estimate_s=lambda _: SMALL_S)
    found = [
        Counter(one.lease.org_id for one in await hand.claim({"default": 12})) for _ in range(3)
    ]
    assert found[:2] == [Counter({orgs[0]: 8, orgs[1]: 4}), Counter(dict.fromkeys(orgs[2:7], 2))]
    # Five orgs had the second one's ten items: for 12 slots six are needed, and a twentieth more and two are read.
    assert found[2] == Counter({orgs[7]: 2} | dict.fromkeys(orgs[8:16], 1))
    assert hand.has_more
    rest = sum(await _claims(hand, 12), Counter())
    assert rest == Counter({orgs[1]: 4} | dict.fromkeys(orgs[16:], 1))
