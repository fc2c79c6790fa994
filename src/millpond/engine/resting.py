"""Resting: runs give their slots back until one of their waits is over.

Called by `executor`, for many runs in one transaction where they go to wait at once. Invariants: the live rows are
locked first; going to wait checks every condition again under that lock, and whoever makes a condition true takes it
too, so that no wake-up is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import orjson

from millpond.db.pool import Connection, EngineDatabase
from millpond.db.queries import queries
from millpond.engine import parking
from millpond.engine.duties import Duty
from millpond.engine.events import append
from millpond.engine.leases import Lease, hold, hold_free
from millpond.engine.needs import Ask
from millpond.engine.sharing import AGAIN, Again, Shared
from millpond.engine.waits import Readied, Wake, ready
from millpond.errors import LeaseLost

_SQL = queries("waits")
_NOTHING: Mapping[str, Ask] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rest:
    """A run that is to wait until the wait of one of these steps is over.

    A cancel ends the wait too, unless the run is at its endings and does not heed it. Steps with `asks`, by step key,
    wait for room in line; others of a run that `was_lined` before do so no more.
    """

    lease: Lease
    step_keys: Sequence[str]
    is_human: bool
    heeds_cancel: bool = True
    asks: Mapping[str, Ask] = field(default_factory=lambda: _NOTHING)
    was_lined: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether nothing is to be written of lines."""
        return not self.asks and not self.was_lined

    @property
    def state(self) -> str:
        """The state in which the run waits."""
        return "awaiting_input" if self.is_human else "waiting"

    def told(self) -> str:
        """Return what the event tells, as JSON text."""
        return orjson.dumps({"steps": list(self.step_keys)}).decode()


class Resting:
    """Lets the runs of one worker rest, many at once where many go to wait."""

    def __init__(self, database: EngineDatabase) -> None:
        self._database = database
        self._plain: Shared[Rest, Readied | None] = Shared(self._rest)

    async def rest(self, rest: Rest) -> Readied | None:
        """Give the slot back; returns the run if a wait is over already, raises LeaseLost without a lease."""
        if rest.is_plain:
            return await self._plain.ask(rest)
        return await rest_alone(self._database, rest)

    async def close(self) -> None:
        """Stop; whoever still waits gets LeaseLost."""
        await self._plain.close()

    async def _rest(self, rests: Sequence[Rest]) -> list[Readied | LeaseLost | Again | None]:
        return await rest_all(self._database, rests)


async def rest_alone(database: EngineDatabase, rest: Rest) -> Readied | None:
    """Let one run rest, waiting for its row; returns it if a wait is over already, raises LeaseLost without a lease."""
    (answer,) = await rest_all(database, [rest], waits=True)
    assert not isinstance(answer, (LeaseLost, Again))
    return answer


async def rest_all(
    database: EngineDatabase, rests: Sequence[Rest], *, waits: bool = False
) -> list[Readied | LeaseLost | Again | None]:
    """Let runs rest that nobody else holds; returns, in order, those for which a wait is over already, and faults.

    One whose row is waited for is alone, and raises LeaseLost without a lease.
    """
    answers: list[Readied | LeaseLost | Again | None] = [LeaseLost("the lease is gone")] * len(
        rests
    )
    async with database.duty("park") as con:
        leases = [rest.lease for rest in rests]
        seen: Mapping[int, bool | None] = (
            {0: await hold(con, *leases)} if waits else await hold_free(con, leases)
        )
        held = [nth for nth, is_cancelled in seen.items() if is_cancelled is not None]
        goes = {nth for nth in held if seen[nth] and rests[nth].heeds_cancel}
        plain = [nth for nth in held if nth not in goes and rests[nth].is_plain]
        rested = await _rest_plain(con, plain, rests)
        for nth in seen:
            answers[nth] = AGAIN
        for nth in held:
            answers[nth] = (
                None if nth in rested else await _rest_one(con, rests[nth], goes=nth in goes)
            )
    return answers


async def _rest_plain(con: Connection, plain: Sequence[int], rests: Sequence[Rest]) -> set[int]:
    """Let those rest at once whose waits are not over; returns their positions."""
    if not plain:
        return set()
    ours = [rests[nth] for nth in plain]
    keys = [(nth, key) for nth in plain for key in rests[nth].step_keys]
    rows = await con.fetch(
        _SQL["rest_all"],
        plain,
        [rest.lease.org_id for rest in ours],
        [rest.lease.run_id for rest in ours],
        [rest.lease.token for rest in ours],
        [rest.state for rest in ours],
        [rest.told() for rest in ours],
        [nth for nth, _ in keys],
        [key for _, key in keys],
    )
    return {row["nth"] for row in rows}


async def _rest_one(con: Connection, rest: Rest, *, goes: bool) -> Readied | None:
    lease = rest.lease
    told = [key for key in rest.step_keys if key not in rest.asks]
    goes = goes or await con.fetchval(_SQL["can_go"], lease.org_id, lease.run_id, told)
    await con.execute(_SQL["unlease"], lease.org_id, lease.item_id, lease.token)
    if goes:
        await con.execute(_SQL["clear_suspect"], lease.org_id, lease.item_id)
        return (await ready(con, [Wake(org_id=lease.org_id, run_id=lease.run_id)]))[0]
    await parking.stand(con, lease, list(rest.asks.values()))
    if rest.asks:
        await append(con, lease.org_id, lease.run_id, [], duties=Duty.WAITS | Duty.LINES)
    state = rest.state
    await con.execute(
        _SQL["rest"], lease.org_id, lease.run_id, state, f"run.{state}", rest.told(), 0
    )
    return None
