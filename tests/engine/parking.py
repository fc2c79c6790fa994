"""Claims by hand, and short ways to park lanes under limits."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from tests.engine.conftest import Pond

from millpond.db.queries import queries
from millpond.engine import ceilings
from millpond.engine.claim import Claimer
from millpond.engine.leases import Claimed
from millpond.engine.needs import Ask
from millpond.engine.pauses import Scope, pause
from millpond.engine.submit import submit
from millpond.types import NO_ORG

KEY = "provider:one"
ROOM = f"concurrency 0 0 {KEY}"


def ask_of(
    run: Claimed,
    *keys: str,
    key: str = "ask:0",
    since_us: int | None = None,
    is_beside: bool = False,
) -> Ask:
    """Make a step of a claimed run ask for room under keys."""
    lease = run.lease
    return Ask(
        org_id=lease.org_id,
        item_id=lease.item_id,
        token=lease.token,
        step_key=key,
        keys=keys or (KEY,),
        since_us=since_us,
        is_beside=is_beside,
    )


class Hand:
    """Claims by hand, as a worker of some queues that has some flows."""

    def __init__(self, pond: Pond, claimer: Claimer, worker_id: uuid.UUID) -> None:
        self.pond = pond
        self.claimer = claimer
        self.worker_id = worker_id
        self.has_more = False

    @classmethod
    async def register(
        cls,
        pond: Pond,
        *able: str,
        queues: Sequence[str] = ("default",),
        estimate_s: Callable[[str], float] = lambda _: 1.0,
        try_s: Callable[[str], float] | None = None,
    ) -> Hand:
        worker_id, names = uuid.uuid4(), list(able or ["echo@1"])
        slots = orjson.dumps(dict.fromkeys(queues, 8)).decode()
        async with pond.engine_db.duty("test") as con:
            await con.execute(
                queries("maintenance")["register_worker"],
                *(worker_id, "here", 1, slots, names, 600.0, "", "{}"),
            )
        return cls(
            pond,
            Claimer(
                pond.engine_db,
                worker_id=worker_id,
                capabilities=names,
                estimate_s=estimate_s,
                try_s=try_s,
            ),
            worker_id,
        )

    async def claim(self, free: Mapping[str, int] | None = None) -> list[Claimed]:
        claimed, self.has_more = await self.claimer.claim(free or {"default": 8})
        return claimed

    async def soon(self, most: int = 12) -> list[Claimed]:
        """Claim as often as claims say that there is more, and once again; returns what came."""
        found = []
        for _ in range(most):
            found += await self.claim()
            if not self.has_more:
                break
        return found + await self.claim()


async def end(pond: Pond, claimed: Sequence[Claimed]) -> None:
    """Let work be over."""
    async with pond.engine_db.duty("test") as con:
        ids = [one.lease.item_id for one in claimed]
        await con.execute("delete from lease where item_id = any($1::uuid[])", ids)
        await con.execute("delete from item where item_id = any($1::uuid[])", ids)


async def send(pond: Pond, count: int = 1, *, flow: str = "echo", **options: Any) -> None:
    """Submit runs that have the key, each in a lane of its own."""
    options.setdefault("keys", [KEY])
    keys = options.pop("keys")
    intents = [
        pond.intent(flow, None, keys=[*keys, f"nth:{uuid.uuid4().hex}"], **options)
        for _ in range(count)
    ]
    async with pond.db.org(intents[0].org_id) as con:
        await submit(con, intents)


async def unlimit(
    pond: Pond, key: str = KEY, org_id: int = NO_ORG, kind: Any = "concurrency"
) -> None:
    async with pond.db.globals() if org_id == NO_ORG else pond.db.org(org_id) as con:
        await ceilings.remove_limit(con, org_id, key, kind)


async def rooms(pond: Pond) -> list[tuple[Any, ...]]:
    async with pond.engine_db.duty("test") as con:
        rows = await con.fetch(
            "select room, queue, capability, due_us from room order by room, queue, capability"
        )
    return [tuple(row) for row in rows]


async def let_be_awake(pond: Pond, org_id: int, *, suffix: str = "") -> None:
    """Put an org's parked lanes into the active order as a claim does that then has no slot for them."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update lane set active = true, capability = capability || $2"
            " where org_id = $1 and parked_on is not null",
            *(org_id, suffix),
        )
        await con.execute("update share set active = true where org_id = $1", org_id)
        if suffix:
            await con.execute(
                "insert into room (room, queue, capability, due_us, version, maximum)"
                " select room, queue, capability || $1, due_us, version, maximum from room",
                suffix,
            )


def orgs(claimed: Sequence[Claimed]) -> list[int]:
    return [one.lease.org_id for one in claimed]


async def hold(pond: Pond, org_id: int) -> None:
    async with pond.db.org(org_id) as con:
        await pause(con, org_id, Scope(), "user:ann", "repairs")
