"""Runs submitted one at a time, by themselves or in somebody's transaction, and many at once: the same rows."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from asyncpg.pgproto.pgproto import UUID as DriverUUID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.property.conftest import Ground

from millpond.engine.payloads import INLINE_BYTES
from millpond.engine.submit import submit, submit_alone
from millpond.types import Backing, Intent, Origin, Parent, new_id

# What is of the moment, or of the id.
_OWN = {"run_id", "item_id", "created_at", "at", "rank", "xid", "due_at", "deadline_at"}
_BACKINGS = [
    Backing(stamp=3, permission="runs:start flows:pay"),
    Backing(stamp=-1),
    Backing(stamp=2, permission=None, lent=uuid.UUID(int=7), granted_by="user:owner"),
]
# Ids come from the database, too, where the driver has a class of its own for them.
_IDS = st.uuids().map(lambda one: DriverUUID(str(one)))
_ORIGINS = st.one_of(
    st.builds(Origin, run_id=_IDS, kind=st.just("continued")),
    st.builds(Origin, run_id=_IDS, kind=st.just("rerun"), from_step=st.sampled_from([None, "s#1"])),
)
_PARENTS = st.builds(
    Parent,
    run_id=_IDS,
    step_key=st.just("main:child:1"),
    close_policy=st.sampled_from(["cancel", "abandon", "wait"]),
)
_TEXTS = st.text("aé\U0001f600\"\\{,'", max_size=4)
_INTENTS = st.builds(
    Intent,
    org_id=st.just(0),
    flow=st.sampled_from(["echo", 'a "quoted" flow']),
    version=st.integers(1, 2),
    queue=st.sampled_from(["default", "llm"]),
    input=st.one_of(st.just(b"null"), st.just(b'{"n":[1,2]}'), _TEXTS.map(orjson.dumps)),
    subject=st.just("user:test"),
    priority=st.integers(-100, 100),
    delay_s=st.sampled_from([0.0, 0.0, 0.0, 5.0]),
    deadline_s=st.sampled_from([None, None, None, 60.0]),
    keys=st.sampled_from([(), ("org:1",), ("provider:b", "model:a")]),
    timeout_s=st.sampled_from([None, 1.5]),
    traceparent=st.sampled_from([None, f"00-{'a' * 32}-{'b' * 16}-01"]),
    labels=st.dictionaries(_TEXTS, _TEXTS, max_size=2),
    dedup_key=st.sampled_from([None, "once"]),
    parent=st.one_of(st.none(), _PARENTS),
    origin=st.one_of(st.none(), _ORIGINS),
    duties=st.sampled_from([0, 16]),
    backing=st.one_of(st.none(), st.sampled_from(_BACKINGS)),
    behind=st.sampled_from([(), ("user:a", "run:b")]),
    urgency=st.sampled_from(["standard", "interactive"]),
)


async def _stored(ground: Ground, intents: Sequence[Intent]) -> list[dict[str, Any]]:
    """Return what is stored of each run, but for what is its own; its moments agree among themselves."""
    found = []
    for intent in intents:
        rows: dict[str, Any] = {}
        for table, column in (("run", "run_id"), ("item", "item_id"), ("event", "run_id")):
            row = await ground.admin.fetchrow(
                f"select * from millpond.{table} where org_id = $1 and {column} = $2",
                intent.org_id,
                intent.run_id,
            )
            assert row is not None, table
            rows[table] = dict(row)
        ready = await ground.admin.fetch(
            "select lane_id, rank from millpond.ready where org_id = $1 and item_id = $2",
            intent.org_id,
            intent.run_id,
        )
        timers = await ground.admin.fetch(
            "select step_key, kind, due_at from millpond.timer where org_id = $1 and run_id = $2 order by kind",
            intent.org_id,
            intent.run_id,
        )
        at, rank = rows["run"]["created_at"], rows["item"]["rank"]
        assert rows["event"]["at"] == at
        assert [row["rank"] for row in ready] == [rank][: len(ready)]
        assert abs(rank - at.timestamp() * 1e6) < 1000
        waits = {row["kind"]: (row["due_at"] - at).total_seconds() for row in timers}
        own = {name: {k: v for k, v in row.items() if k not in _OWN} for name, row in rows.items()}
        found.append(own | {"ready": [row["lane_id"] for row in ready], "waits": waits})
    return found


async def _arrived(ground: Ground) -> set[tuple[Any, ...]]:
    rows = await ground.admin.fetch(
        "select org_id, lane_id, queue, capability, keys, offset_us, min_rank, "
        "(select min(rank) from millpond.ready r where r.org_id = a.org_id and r.lane_id = a.lane_id) as first "
        "from millpond.arrival a order by min_rank desc"
    )
    firsts = {row["lane_id"]: row["min_rank"] for row in rows}
    assert all(firsts[row["lane_id"]] == row["first"] for row in rows)
    return {(*row.values(),)[:4] + (tuple(row["keys"]), row["offset_us"]) for row in rows}


@pytest.mark.timeout(600)
def test_one_by_one_and_all_at_once_store_the_same(ground: Ground) -> None:
    async def stored(intents: list[Intent], way: str) -> tuple[object, object]:
        await ground.empty()
        own = [replace(one, org_id=ground.org_ids[0], run_id=new_id()) for one in intents]
        if way == "alone":
            for one in own:
                assert await submit_alone(ground.db, [one]) == [one.run_id]
        else:
            async with ground.db.org(ground.org_ids[0]) as con:
                for some in [own] if way == "many" else [[one] for one in own]:
                    await submit(con, some)
        return await _stored(ground, own), await _arrived(ground)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(_INTENTS, min_size=2, max_size=4))
    def ways_agree(intents: list[Intent]) -> None:
        many = ground.run(stored(intents, "many"))
        assert ground.run(stored(intents, "one by one")) == many
        assert ground.run(stored(intents, "alone")) == many

    ways_agree()


def test_a_big_input_stands_in_a_row_of_its_own_either_way(ground: Ground) -> None:
    async def kept(count: int) -> list[tuple[object, object]]:
        await ground.empty()
        big = Intent(
            org_id=ground.org_ids[0],
            flow="echo",
            version=1,
            queue="default",
            input=orjson.dumps("x" * INLINE_BYTES),
            subject="user:test",
        )
        intents = [replace(big, run_id=new_id()) for _ in range(count)]
        await submit_alone(ground.db, intents)
        rows = await ground.admin.fetch(
            "select r.input, p.body from millpond.run r join millpond.payload p using (org_id, run_id)"
        )
        return [(row["input"], row["body"]) for row in rows]

    assert ground.run(kept(1)) * 2 == ground.run(kept(2))
    assert ground.run(kept(1))[0][0] is None
