"""Plans of the hot statements: by key, whatever the tables' sizes were when the plan was made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from tests.engine.conftest import Pond

from millpond.db.queries import queries

HOT = {
    ("claim", "consume"),
    ("claim", "read"),
    ("claim", "take"),
    ("claim", "settle"),
    ("commit", "record"),
    ("commit", "finish"),
    ("commit", "hold"),
    ("waits", "ready"),
    ("waits", "rest"),
    ("waits", "can_go"),
    ("waits", "history"),
    ("waits", "due"),
    ("waits", "next_due"),
    ("waits", "lock_items"),
    ("waits", "take_timers"),
    ("events", "append"),
    ("remote", "hold_run"),
    ("remote", "send"),
    ("remote", "orders"),
    ("remote", "hold"),
    ("remote", "lock_runs"),
    ("remote", "settle"),
    ("remote", "stop"),
    ("payloads", "keep"),
    ("payloads", "read"),
}
# The claim reads whole what it consumes whole; its tables hold what has just arrived.
WHOLE = {"arrival"}
TABLES = {
    "run",
    "item",
    "ready",
    "lease",
    "lane",
    "share",
    "step",
    "event",
    "timer",
    "arrival",
    "payload",
}


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


@pytest.mark.parametrize("rows", [1, 3000])
async def test_hot_statements_go_by_key(pond: Pond, rows: int) -> None:
    async def idle(ctx: Any, _: Any) -> None:
        return None

    flow = pond.flow(idle)
    from millpond.engine.submit import submit

    async with pond.db.org(pond.org_id) as con:
        await submit(con, [pond.intent(flow, n) for n in range(rows)])
    found = []
    async with pond.engine_db.duty("explain") as con:
        for room, name in sorted(HOT):
            statement = queries(room)[name]
            await con.execute(f"prepare hot as {statement}")
            nulls = ", ".join(
                ["null"] * max(map(int, re.findall(r"\$(\d+)", statement)), default=0)
            )
            text = await con.fetchval(
                f"explain (format json) execute hot{f'({nulls})' if nulls else ''}"
            )
            await con.execute("deallocate hot")
            for node in _nodes(orjson.loads(text)[0]["Plan"]):
                table = node.get("Relation Name")
                if table not in TABLES - WHOLE or not node["Node Type"].endswith("Scan"):
                    continue
                by_order = name in ("due", "next_due", "read")
                if "Index Cond" not in node and not by_order:
                    found.append(f"{room}.{name}: {node['Node Type']} on {table}")
    assert found == []
