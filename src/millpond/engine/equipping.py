"""Equipping: what a session's attempts work with, opened before the first of them and closed after the last.

Called by `worker`. Invariant: what others write through is closed after them.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Mapping

from millpond.db.pool import EngineDatabase
from millpond.engine.commit import Committer
from millpond.engine.deltas import Deltas
from millpond.engine.family import Family
from millpond.engine.hints import Hints, Listener
from millpond.engine.leasehold import Leasehold
from millpond.engine.leases import Lease
from millpond.engine.placing import Placing
from millpond.engine.resting import Resting
from millpond.engine.riding import Riding
from millpond.engine.rights import Asking, Rights
from millpond.engine.scope import Deadlines, Scope
from millpond.engine.settling import Settler
from millpond.engine.slots import Slots
from millpond.engine.throttling import Throttling
from millpond.engine.tolls import Tolls
from millpond.engine.vault import Vault


@contextlib.asynccontextmanager
async def equipped(
    database: EngineDatabase,
    *,
    engine_url: str,
    listen_url: str,
    worker_id: uuid.UUID,
    slots: Slots,
    placing: Placing,
    throttling: Throttling,
    resources: Mapping[type, object],
    labels: Mapping[str, str],
    rights: Rights | None,
    vault: Vault | None,
    leasehold: Leasehold,
    expect: Callable[[float | None], None],
    gather_s: float,
    heard: Mapping[str, Callable[[str], None]],
    on_cancel_requested: Callable[[Lease], None],
) -> AsyncIterator[Scope]:
    """Open what attempts of one session need; `expect` hears by when steps under way have to be over."""
    hints = await Hints.connect(engine_url)
    committer = Committer(
        database, hints, on_cancel_requested=on_cancel_requested, gather_s=gather_s
    )
    committer.start()
    listener = Listener(listen_url, heard, near=True)
    await listener.start()
    settler = Settler(database, hints)
    deltas = Deltas(database, hints)
    family = Family(database)
    resting = Resting(database)
    riding = Riding(
        database,
        wake=slots.wake,
        on_freed=slots.free_room,
        summon=hints.summon,
        tolls=Tolls(slots.charges, slots.learn_try),
    )
    asking = Asking(rights)
    try:
        yield Scope(
            database=database,
            committer=committer,
            hints=hints,
            settler=settler,
            deltas=deltas,
            family=family,
            resting=resting,
            placing=placing,
            throttling=throttling,
            riding=riding,
            worker_id=worker_id,
            resources=resources,
            labels=labels,
            asking=asking,
            vault=vault,
            timed=Deadlines(expect),
            leasehold=leasehold,
        )
    finally:
        await listener.close()
        await asking.close()
        await riding.close()
        await deltas.close()
        await family.close()
        await resting.close()
        await settler.close()
        await committer.close()
        await hints.close()
