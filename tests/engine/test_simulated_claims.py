"""The simulation tells what the product's claims do: the same runs go in the same rounds, on a real database."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from tests.engine.conftest import Pond
from tests.engine.parking import Hand, end
from tests.engine.test_limits import limit, second_org
from tests.engine.test_tokens import need, tokens, use

from millpond.engine.charges import EVERY_S, Charges
from millpond.engine.charging import settle
from millpond.engine.estimates import Estimates
from millpond.engine.keying import parse_key
from millpond.engine.leases import Claimed
from millpond.engine.loads import Load, Work
from millpond.engine.rules import Rule, Rules
from millpond.engine.simulating import simulate
from millpond.engine.submit import submit
from millpond.engine.tokens import Used

ONE, TWO = "provider:one", "provider:two"
Round = Counter[tuple[int, tuple[str, ...]]]


async def _rounds(pond: Pond, hand: Hand, estimates: Estimates, count: int) -> list[Round]:
    """Claim, let all of it end after a second and be charged as it goes, claim again, until all has gone."""
    found: list[Round] = []
    charges = Charges()
    left = count
    while left:
        claimed = await _fill(hand)
        assert claimed, "work stands still"
        async with pond.engine_db.duty("test") as con:
            rows = await con.fetch(
                "select org_id, keys from lease where item_id = any($1::uuid[])",
                [one.lease.item_id for one in claimed],
            )
        found.append(Counter((row["org_id"], tuple(row["keys"])) for row in rows))
        began, estimate_s = float(len(found)), estimates.estimate_s("echo@1")
        uses = [charges.begin(one.lease.org_id, "default", estimate_s, began) for one in claimed]
        for quarter in range(1, 4):
            await settle(pond.engine_db, charges.take(began + quarter * EVERY_S))
        await end(pond, claimed)
        for one in uses:
            charges.end(one, 1.0)
            estimates.learn("echo@1", 1.0)
        await settle(pond.engine_db, charges.take(began + 1.0))
        left -= len(claimed)
    return found


async def _fill(hand: Hand) -> list[Claimed]:
    """Claim for what is left of eight slots, as long as claims say that there is more."""
    found: list[Claimed] = []
    while len(found) < 8:
        found += await hand.claim({"default": 8 - len(found)})
        if not hand.has_more:
            break
    return found


def _simulated(runs: Sequence[tuple[int, tuple[str, ...]]], rules: Rules) -> list[Round]:
    load = Load()
    for org_id, keys in runs:
        work = Work(org_id=org_id, queue="default", capability="echo@1", keys=keys)
        if work not in load.works:
            load.works.append(work)
        load.add(0.0, 1.0, load.works.index(work))
    rounds: defaultdict[float, Round] = defaultdict(Counter)
    for start_s, run in zip(
        simulate(load, [{"default": 8}], rules=rules).starts_s, runs, strict=True
    ):
        rounds[start_s][run] += 1
    return [rounds[start_s] for start_s in sorted(rounds)]


@pytest.mark.parametrize(
    "limits",
    [{}, {ONE: 3}, {ONE: 3, TWO: 1}, {"org:*": 3, ONE: 4}],
    ids=["none", "one", "two", "org"],
)
async def test_runs_go_in_the_rounds_that_were_simulated(
    pond: Pond, limits: dict[str, int]
) -> None:
    orgs = [pond.org_id, await second_org(pond.db), await second_org(pond.db)]
    runs = [
        *((orgs[0], (ONE,)) for _ in range(14)),
        *((orgs[1], ()) for _ in range(7)),
        *((orgs[1], (TWO,)) for _ in range(3)),
        *((orgs[2], (ONE,)) for _ in range(6)),
    ]
    for key, maximum in limits.items():
        await limit(pond.db, key, maximum)
    for org_id, keys in runs:
        intent = pond.intent("echo", None, keys=list(keys), org_id=org_id)
        async with pond.db.org(org_id) as con:
            await submit(con, [intent])
    estimates = Estimates()
    hand = await Hand.register(pond, estimate_s=estimates.estimate_s)
    held = Rules.of(
        Rule(owner=0, key=parse_key(key), kind="concurrency", maximum=maximum)
        for key, maximum in limits.items()
    )
    assert await _rounds(pond, hand, estimates, len(runs)) == _simulated(runs, held)


USED = [[100] * 12, [20, 30, 550, 10, 40, 10, 15, 25, 60, 70, 30, 20]]


@pytest.mark.parametrize("used", USED, ids=["alike", "one above its estimate"])
async def test_tokens_come_back_and_are_owed_in_the_rounds_that_were_simulated(
    pond: Pond, used: list[int]
) -> None:
    """Each declares 300 of 1,500 an hour; a round ends, tells what it used, and the next is claimed."""
    await tokens(pond, 1500)
    hand = await Hand.register(pond)
    left = list(used)
    rounds: list[int] = []
    for _ in used:
        await need(pond, 300)
    while left:
        claimed = await _fill(hand)
        assert claimed, "work stands still"
        rounds.append(len(claimed))
        for one in claimed:
            await use(pond, one, left.pop(0))
        await end(pond, claimed)
    load = Load()
    load.works.append(
        Work(org_id=1, queue="default", capability="echo@1", keys=(ONE, "tokens:300"))
    )
    for tokens_used in used:
        load.add(0.0, 1.0, 0, (Used((ONE,), tokens_used),))
    rule = Rule(owner=0, key=ONE, kind="tokens", maximum=1500, period_s=3600.0, burst=1500)
    starts_s = simulate(load, [{"default": 8}], rules=Rules.of([rule])).starts_s
    assert list(Counter(sorted(starts_s)).values()) == rounds
    assert len(rounds) > 2
