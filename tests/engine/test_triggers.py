"""Flows started by events on real Postgres: received once, matched, gathered, started, told of.

No test waits for a period: it moves a group's due time into the past.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import orjson
import pytest
from pydantic import BaseModel
from tests.engine.conftest import Pond

from millpond.db.queries import queries
from millpond.engine import inbound, triggers
from millpond.engine.inbound import Incoming, Received
from millpond.engine.triggers import Draft, EventInput, EventsInput, Trigger
from millpond.errors import Conflict, InvalidInput, Unavailable
from millpond.types import new_id


class Order(BaseModel):
    amount: int
    customer: str = "acme"


async def ship(ctx: Any, given: EventInput[Order]) -> int:
    return given.event.data.amount


async def tally(ctx: Any, given: EventsInput[Order]) -> list[int]:
    return [event.data.amount for event in given.events]


@pytest.fixture
async def shop(pond: Pond) -> Pond:
    """A database whose flows are published, with nobody to run them."""
    pond.flow(ship)
    pond.flow(tally)
    for flow in pond.registry.flows.values():
        async with pond.engine_db.duty("publish") as con:
            await con.execute(
                """insert into flow_version (flow, version, queue, input_schema)
                   values ($1, 1, 'default', $2)""",
                flow.name,
                orjson.dumps(flow.input.json_schema()).decode(),
            )
    return pond


async def make(pond: Pond, **wish: Any) -> Trigger:
    given = {"name": "ship", "event": "order.placed", "flow": "ship"}
    async with pond.db.org(pond.org_id) as con:
        return await triggers.create(con, pond.org_id, Draft(**{**given, **wish}), "user:ann")


async def read(pond: Pond, trigger: Trigger) -> Trigger:
    async with pond.db.org(pond.org_id) as con:
        return await triggers.get(con, pond.org_id, trigger.trigger_id)


async def send(
    pond: Pond, *data: Any, name: str = "order.placed", event_id: str | None = None
) -> list[Received]:
    events = [Incoming(event_id=event_id or str(new_id()), name=name, data=one) for one in data]
    async with pond.db.org(pond.org_id) as con:
        received, _ = await inbound.receive(con, pond.org_id, events, "user:ann")
    return received


async def inputs(pond: Pond) -> list[Any]:
    """The inputs of all runs so far, in order of their start."""
    async with pond.db.org(pond.org_id) as con:
        rows = await con.fetch("select input from run order by created_at, run_id")
    return [orjson.loads(row["input"]) for row in rows]


async def amounts(pond: Pond) -> list[Any]:
    """What each run so far got: one amount, or the list of a batch."""
    return [
        [event["data"]["amount"] for event in given["events"]]
        if "events" in given
        else given["event"]["data"]["amount"]
        for given in await inputs(pond)
    ]


async def let_lapse(pond: Pond) -> int:
    """Make every group due, and let maintenance see to them; returns how many runs started."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update trigger_group set due_at = clock_timestamp() where due_at is not null"
        )
    return len(await inbound.lapse(pond.engine_db))


async def test_a_flows_own_deadline_holds_for_runs_of_a_trigger(shop: Pond) -> None:
    async with shop.engine_db.duty("test") as con:
        await con.execute("update flow_version set deadline_s = 600")
    await make(shop)
    (received,) = await send(shop, {"amount": 7})
    run = await shop.run_row(uuid.UUID(received.runs[0]["run_id"]))
    assert (run["deadline_at"] - run["created_at"]).total_seconds() == 600.0


async def test_an_event_starts_the_flows_that_listen_for_it(shop: Pond) -> None:
    await make(shop, labels={"team": "ops"}, priority=4)
    await make(shop, name="other", event="order.cancelled")
    async with shop.worker():
        (received,) = await send(shop, {"amount": 7})
        (told,) = received.runs
        run = await shop.ended(uuid.UUID(told["run_id"]))
    assert (run["outcome"], run["output"]) == ("succeeded", 7)
    assert (run["subject"], run["priority"]) == ("service:trigger:ship", 4)
    labels = {"team": "ops", "millpond.trigger": "ship", "millpond.event": received.event_id}
    assert orjson.loads(run["labels"]) == labels
    event = run["input"]["event"]
    assert (event["id"], event["name"]) == (received.event_id, "order.placed")
    assert event["received_at"].endswith("Z")


async def test_a_filter_lets_only_what_satisfies_it_pass(shop: Pond) -> None:
    large = {"properties": {"amount": {"minimum": 100}}, "required": ["amount"]}
    await make(shop, filter=large)
    await send(shop, {"amount": 5}, {"amount": 500}, {}, "text")
    assert await amounts(shop) == [500]


async def test_a_repeated_event_starts_nothing_and_is_answered_as_the_first(shop: Pond) -> None:
    await make(shop)
    (first,) = await send(shop, {"amount": 7}, event_id="o-1")
    (again,) = await send(shop, {"amount": 7}, event_id="o-1")
    assert (first.is_repeat, again.is_repeat) == (False, True)
    assert (again.runs, again.received_at) == (first.runs, first.received_at)
    with pytest.raises(Conflict) as caught:
        await send(shop, {"amount": 8}, event_id="o-1")
    assert caught.value.code == "event_id_reused"
    assert await amounts(shop) == [7]


async def test_an_event_sent_by_many_at_once_is_received_once(shop: Pond) -> None:
    await make(shop)
    received = await asyncio.gather(*(send(shop, {"amount": 7}, event_id="o-1") for _ in range(8)))
    assert sorted(one.is_repeat for (one,) in received) == [False] + [True] * 7
    assert len({one.runs[0]["run_id"] for (one,) in received}) == 1
    assert await amounts(shop) == [7]


async def test_a_transaction_that_breaks_leaves_no_event_and_no_run(shop: Pond) -> None:
    await make(shop)
    event = Incoming(event_id="o-1", name="order.placed", data={"amount": 7})
    with pytest.raises(Unavailable):
        async with shop.db.org(shop.org_id) as con:
            await inbound.receive(con, shop.org_id, [event], "user:ann")
            raise Unavailable("the API was killed here")
    assert await shop.count("inbound_event") == 0
    assert await shop.count("run") == 0
    (received,) = await send(shop, {"amount": 7}, event_id="o-1")
    assert (received.is_repeat, len(received.runs)) == (False, 1)


async def test_a_batch_gathers_up_to_its_count(shop: Pond) -> None:
    await make(shop, flow="tally", mode="batch", max_count=3, max_wait_s=3600.0)
    received = await send(shop, *({"amount": n} for n in range(7)))
    assert sorted(await amounts(shop)) == [[0, 1, 2], [3, 4, 5]]
    assert [len(one.runs) for one in received] == [1, 1, 1, 1, 1, 1, 0]
    assert await let_lapse(shop) == 1
    assert sorted(await amounts(shop)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert await shop.count("trigger_group") == 0
    (later, *_), _ = await listed(shop)
    assert (later.event_id, later.runs[0]["at_once"]) == (received[-1].event_id, False)


async def listed(pond: Pond, **wanted: Any) -> tuple[list[Received], bool]:
    async with pond.db.org(pond.org_id) as con:
        return await inbound.page(con, pond.org_id, **{"limit": 50, **wanted})


async def test_two_processes_receiving_at_once_lose_nothing(shop: Pond) -> None:
    await make(shop, flow="tally", mode="batch", max_count=4, max_wait_s=3600.0)
    await make(shop, name="by", flow="tally", mode="batch", max_count=3, max_wait_s=3600.0,
               group_by="customer")  # fmt: skip
    bursts = [
        [{"amount": 10 * sender + n, "customer": f"c{n % 2}"} for n in range(5)]
        for sender in range(8)
    ]
    await asyncio.gather(*(send(shop, *burst) for burst in bursts))
    await let_lapse(shop)
    got = sorted(amount for batch in await amounts(shop) for amount in batch)
    sent = sorted(one["amount"] for burst in bursts for one in burst)
    assert got == sorted([*sent, *sent])  # each trigger got every event once
    assert all(len(batch) <= 4 for batch in await amounts(shop))
    assert await shop.count("trigger_group") == 0


async def test_many_maintainers_at_once_fire_each_group_once(shop: Pond) -> None:
    await make(shop, mode="debounce", period_s=3600.0, group_by="customer")
    await send(shop, *({"amount": n, "customer": f"c{n}"} for n in range(30)))
    async with shop.engine_db.duty("test") as con:
        await con.execute("update trigger_group set due_at = clock_timestamp()")
    fired = await asyncio.gather(*(inbound.lapse(shop.engine_db) for _ in range(5)))
    assert sum(map(len, fired)) == 30
    assert sorted(await amounts(shop)) == list(range(30))


async def test_a_debounced_flow_gets_the_last_event_of_each_group(shop: Pond) -> None:
    trigger = await make(shop, mode="debounce", period_s=3600.0, group_by="customer")
    await send(shop, {"amount": 1, "customer": "a"}, {"amount": 2, "customer": "b"})
    await send(shop, {"amount": 3, "customer": "a"}, {"amount": 4})
    assert await inbound.lapse(shop.engine_db) == []
    async with shop.db.org(shop.org_id) as con:
        waiting = await triggers.waiting(con, shop.org_id, trigger.trigger_id)
    assert (waiting.groups, waiting.events, waiting.dropped) == (3, 3, 1)
    assert await let_lapse(shop) == 3
    assert sorted(await amounts(shop)) == [2, 3, 4]
    assert (await read(shop, trigger)).dropped == 1


async def test_a_group_that_was_due_goes_before_the_event_that_finds_it(shop: Pond) -> None:
    await make(shop, mode="debounce", period_s=3600.0)
    await send(shop, {"amount": 1})
    async with shop.engine_db.duty("test") as con:
        await con.execute("update trigger_group set due_at = clock_timestamp()")
    (received,) = await send(shop, {"amount": 2})
    assert (await amounts(shop), received.runs) == ([1], [])
    assert await let_lapse(shop) == 1
    assert await amounts(shop) == [1, 2]


async def test_a_throttled_flow_runs_once_a_period_and_the_rest_is_counted(shop: Pond) -> None:
    trigger = await make(shop, mode="throttle", period_s=3600.0)
    await send(shop, {"amount": 1}, {"amount": 2})
    await send(shop, {"amount": 3})
    assert await amounts(shop) == [1]
    assert await let_lapse(shop) == 0
    assert (await read(shop, trigger)).dropped == 2
    await send(shop, {"amount": 4})
    assert await amounts(shop) == [1, 4]


async def test_a_worker_fires_what_is_due_without_being_told(shop: Pond) -> None:
    await make(shop, flow="tally", mode="batch", max_count=10, max_wait_s=0.2)
    async with shop.worker():
        (received,) = await send(shop, {"amount": 1})
        async with asyncio.timeout(30):
            while not (runs := (await listed(shop))[0][0].runs):
                await asyncio.sleep(0.02)
        run = await shop.ended(uuid.UUID(runs[0]["run_id"]))
    assert (run["output"], received.runs) == ([1], [])


async def test_data_that_the_flow_does_not_take_is_told_by_field_and_the_rest_goes_on(
    shop: Pond,
) -> None:
    trigger = await make(shop)
    received = await send(shop, {"amount": "secret"}, {"amount": 5})
    assert [len(one.runs) for one in received] == [0, 1]
    assert (await read(shop, trigger)).last_error is None  # the last start went well
    await send(shop, {"amount": "secret"})
    found = await read(shop, trigger)
    assert found.last_error is not None
    assert found.last_error.startswith("input_mismatch")
    assert "event.data.amount" in found.last_error
    assert "secret" not in found.last_error
    assert found.dropped == 2
    await send(shop, {"amount": 6})
    assert (await read(shop, trigger)).last_error is None


async def test_a_flow_that_nobody_published_is_told_of(shop: Pond) -> None:
    trigger = await make(shop, flow="gone")
    (received,) = await send(shop, {"amount": 5})
    assert received.runs == []
    assert "flow_not_found" in ((await read(shop, trigger)).last_error or "")


async def test_a_paused_trigger_takes_nothing_and_keeps_what_it_held(shop: Pond) -> None:
    trigger = await make(shop, mode="debounce", period_s=3600.0)
    await send(shop, {"amount": 1})
    async with shop.db.org(shop.org_id) as con:
        await triggers.set_paused(con, shop.org_id, trigger.trigger_id, "user:bob", is_paused=True)
    await send(shop, {"amount": 2})
    assert await let_lapse(shop) == 0
    async with shop.db.org(shop.org_id) as con:
        await triggers.set_paused(con, shop.org_id, trigger.trigger_id, "user:bob", is_paused=False)
    assert len(await inbound.lapse(shop.engine_db)) == 1
    assert await amounts(shop) == [1]


async def test_the_end_of_a_pause_misses_no_group_that_is_put_off_meanwhile(shop: Pond) -> None:
    trigger = await make(shop, mode="debounce", period_s=3600.0)
    await send(shop, {"amount": 1})
    async with shop.db.org(shop.org_id) as con:
        await triggers.set_paused(con, shop.org_id, trigger.trigger_id, "user:bob", is_paused=True)

    async def go_on() -> None:
        async with shop.db.org(shop.org_id) as con:
            await triggers.set_paused(
                con, shop.org_id, trigger.trigger_id, "user:bob", is_paused=False
            )

    async with shop.engine_db.duty("test") as con:
        await con.execute("update trigger_group set due_at = clock_timestamp()")
    async with shop.engine_db.duty("test") as con:
        await inbound._lapse(con, 1)
        going_on = asyncio.create_task(go_on())
        await asyncio.wait({going_on}, timeout=0.3)  # as long as it would take
    await going_on
    assert len(await inbound.lapse(shop.engine_db)) == 1


async def test_a_deleted_trigger_drops_what_waited_for_it(shop: Pond) -> None:
    trigger = await make(shop, mode="debounce", period_s=3600.0)
    await send(shop, {"amount": 1})
    async with shop.engine_db.duty("test") as con:  # as one that arrived meanwhile would leave it
        await con.execute(
            "insert into trigger_group (org_id, trigger_id, group_key, events, due_at)"
            " values ($1, $2, 'late', '[{}]', clock_timestamp())",
            shop.org_id,
            new_id(),
        )
    async with shop.db.org(shop.org_id) as con:
        await triggers.delete(con, shop.org_id, trigger.trigger_id)
    assert await let_lapse(shop) == 0
    assert await shop.count("trigger_group") == 0


async def test_a_group_that_cannot_start_is_dropped_alone(shop: Pond) -> None:
    broken = await make(shop, name="broken", mode="debounce", period_s=3600.0)
    await make(shop, name="sound", mode="debounce", period_s=3600.0)
    await send(shop, {"amount": 1})
    huge = orjson.dumps(
        [{"id": "1", "name": "n", "data": {"amount": 1, "note": "x" * (17 * 2**20)},
          "received_at": "2026-01-01T00:00:00Z"}]
    ).decode()  # fmt: skip
    async with shop.engine_db.duty("test") as con:
        await con.execute(
            "update trigger_group set events = $2 where trigger_id = $1", broken.trigger_id, huge
        )
    assert await let_lapse(shop) == 1
    assert "too_large" in ((await read(shop, broken)).last_error or "")
    assert await shop.count("trigger_group") == 0


async def test_another_orgs_triggers_hear_nothing(shop: Pond, other_org: int) -> None:
    async with shop.db.org(other_org) as con:
        draft = Draft(name="ship", event="order.placed", flow="ship")
        await triggers.create(con, other_org, draft, "user:bob")
    (received,) = await send(shop, {"amount": 1})
    assert received.runs == []
    assert await shop.count("run") == 0


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"mode": "debounce"}, "period_s"),
        ({"mode": "throttle"}, "period_s"),
        ({"mode": "batch", "max_count": 5}, "max_wait_s"),
        ({"mode": "batch", "max_wait_s": 5.0}, "max_count"),
        ({"mode": "each", "period_s": 1.0}, "period_s"),
        ({"mode": "each", "group_by": "a"}, "group_by"),
        ({"mode": "throttle", "period_s": 1.0, "max_wait_s": 2.0}, "max_wait_s"),
        ({"mode": "debounce", "period_s": 1.0, "group_by": "a..b"}, "group_by"),
        ({"filter": {"type": "nonsense"}}, "filter"),
        ({"filter": {"$ref": "http://127.0.0.1/schema"}}, "filter"),
        ({"filter": {"pattern": "(?=a)"}}, "filter"),
        ({"filter": {"description": "x" * 17_000}}, "filter"),
        ({"filter": {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {}}}}, "filter"),
        ({"filter": {"anyOf": [{"$dynamicRef": "#a"}, {"$dynamicAnchor": "a"}]}}, "filter"),
        ({"filter": {"not": {"$recursiveRef": "#"}}}, "filter"),
        ({"filter": {"allOf": [{"unevaluatedProperties": False}]}}, "filter"),
    ],
)
def test_a_trigger_that_makes_no_sense_is_refused_by_field(changes: Any, param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        triggers.check(Draft(**{"name": "t", "event": "e", "flow": "f", **changes}))
    assert caught.value.param == param


def test_a_flow_is_checked_for_what_its_trigger_gives_it(pond: Pond) -> None:
    async def other(ctx: Any, given: Order) -> None: ...

    single = Draft(name="t", event="e", flow="ship")
    batch = Draft(name="t", event="e", flow="tally", mode="batch")
    schemas = {flow: pond.flow(flow).input.json_schema() for flow in (ship, tally, other)}
    triggers.check_flow(single, schemas[ship])
    triggers.check_flow(batch, schemas[tally])
    triggers.check_flow(single, {})
    for draft, schema in (
        (single, schemas[tally]),
        (batch, schemas[ship]),
        (single, schemas[other]),
    ):
        with pytest.raises(InvalidInput) as caught:
            triggers.check_flow(draft, schema)
        assert caught.value.code == "input_mismatch"


def test_a_filter_of_a_hostile_pattern_takes_no_time() -> None:
    from millpond.engine import targets

    assert not targets.satisfies('{"pattern": "^(a+)+$"}', "a" * 50_000 + "!")


def test_a_filter_may_look_at_members_named_as_keywords_are() -> None:
    schema = {"properties": {"$ref": {"const": 7}}, "required": ["$ref"]}
    triggers.check(Draft(name="t", event="e", flow="f", filter=schema))


async def test_a_stored_filter_that_would_be_refused_now_is_not_evaluated(shop: Pond) -> None:
    hostile: dict[str, Any] = {"$defs": {"d0": {"type": "string"}}}
    for n in range(1, 40):  # evaluating the last takes 2 ** 39 steps
        part = {"$ref": f"#/$defs/d{n - 1}"}
        hostile["$defs"][f"d{n}"] = {"anyOf": [part, part]}
    trigger = await make(shop)
    await make(shop, name="other")
    async with shop.db.org(shop.org_id) as con:
        await con.execute(
            "update trigger set filter = $2 where trigger_id = $1",
            trigger.trigger_id,
            orjson.dumps({**hostile, "$ref": "#/$defs/d39"}).decode(),
        )
    async with asyncio.timeout(10):
        (received,) = await send(shop, {"amount": 7})
    assert [run["trigger"] for run in received.runs] == ["other"]
    refused = await read(shop, trigger)
    assert refused.dropped == 1
    assert (refused.last_error or "").startswith("bad_schema: ")


async def test_looking_for_events_goes_by_index(shop: Pond, admin_url: str) -> None:
    import asyncpg

    admin = await asyncpg.connect(admin_url)
    await admin.execute("set search_path = millpond, public")
    await admin.execute(
        """insert into inbound_event (org_id, event_id, name, data, sent_by, received_at)
           select 1 + n % 7, 'e' || n, 'order.placed', '{}', 'user:x',
                  clock_timestamp() - n * interval '1 second'
           from generate_series(1, 20000) n"""
    )
    await admin.execute(
        """insert into trigger_group (org_id, trigger_id, group_key, due_at)
           select 1 + n % 7, gen_random_uuid(), 'g', clock_timestamp() + interval '1 hour'
           from generate_series(1, 20000) n"""
    )
    await admin.execute(
        """insert into trigger (org_id, trigger_id, name, event, flow, created_by)
           select 1 + n % 7, gen_random_uuid(), 't' || n, 'event' || n, 'ship', 'user:x'
           from generate_series(1, 20000) n"""
    )
    await admin.execute("analyze inbound_event; analyze trigger_group; analyze trigger")
    await admin.close()
    statements = {
        "page": (shop.org_id, None, None, 51, None),
        "lapsed": (100, None, None),
        "due_groups": (100,),
        "listening": (shop.org_id, ["order.placed"]),
    }
    for name, arguments in statements.items():
        async with shop.engine_db.duty("explain") as con:
            plan = await con.fetch(f"explain {queries('inbound')[name]}", *arguments)
        text = "\n".join(row[0] for row in plan)
        assert "Seq Scan" not in text, f"{name}:\n{text}"
    after = (shop.org_id, "e700", None, 51, None)
    before = (shop.org_id, None, "e700", 51, None)
    for arguments in (after, before):
        async with shop.engine_db.duty("explain") as con:
            statement = f"explain (analyze, costs off) {queries('inbound')['page']}"
            plan = await con.fetch(statement, *arguments)
        text = "\n".join(row[0] for row in plan)
        assert "Seq Scan" not in text, text
        assert "ROW(received_at, event_id)" in text, text
