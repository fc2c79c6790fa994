"""Opening: secrets opened for the steps of an attempt, and hidden from then on in all that its run leaves behind.

Called by `context`, `step_executor`, `step_tries` and `endgame`. Invariants: no run that was started under a grant
opens one; a value is handed out only after it is veiled and it is durable that the run opened it: every later attempt
veils it too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import structlog

from millpond import veil
from millpond.db.queries import queries
from millpond.engine.duties import Duty
from millpond.engine.history import History
from millpond.engine.leases import Claimed
from millpond.engine.rights import Right, right_of
from millpond.engine.scope import Scope
from millpond.engine.vault import Opened
from millpond.errors import Forbidden, LeaseLost, Permanent, Transient, Unavailable

R = TypeVar("R")
_SQL = queries("opening")
_log = structlog.get_logger("millpond.opening")
# Names of steps hold no `!`, so that no flow can forge one.
KEY = "!secret/"
_AGAIN_S = 0.3
# A run that another host can go on with is kept for this long before it is handed back.
_ELSEWHERE_S = 5.0


class Guard(Protocol):
    """What an attempt asks and writes on behalf of its steps."""

    async def refusal(self, key: str, name: str) -> Forbidden | None:
        """Return why the run may not act for its subject any more, audited; None where it may."""
        ...

    async def persist(self, write: Callable[[], Awaitable[R]]) -> R:
        """Do what needs the database, again while that is out of reach."""
        ...


class Opening:
    """Opens secrets for one attempt."""

    def __init__(self, claimed: Claimed, scope: Scope, guard: Guard) -> None:
        self._claimed = claimed
        self._scope = scope
        self._guard = guard
        self._noted: set[str] = set()

    async def open(self, name: str) -> str:
        """Return a secret's value, which is hidden from now on; raises NotFound, Forbidden, Permanent."""
        vault, drawn = self._scope.vault, veil.current()
        if vault is None or drawn is None:
            raise _no_vault()
        await self._permit(name)
        org_id = self._claimed.lease.org_id
        opened = await self._guard.persist(lambda: vault.open(org_id, name))
        drawn.add(name, opened.value)
        if name not in self._noted:
            await self._guard.persist(lambda: self._note(opened))
            self._noted.add(name)
        return opened.value

    async def _permit(self, name: str) -> None:
        """Raise Forbidden, audited, where the run may not open secrets."""
        key, backing = f"{KEY}{name}", self._claimed.backing
        if backing is not None and backing.lent is not None:
            refused = _lent()
            right = Right(self._scope.asking, self._claimed, backing)
            await self._guard.persist(lambda: right.tell(self._scope.database, key, name, refused))
            raise refused
        gone = await self._guard.refusal(key, name)
        if gone is not None:
            raise gone

    async def _note(self, opened: Opened) -> None:
        """Store that the run opened a secret; raises LeaseLost without the lease."""
        lease = self._claimed.lease
        async with self._scope.database.duty("secret") as con:
            is_held = await con.fetchval(
                _SQL["note"],
                lease.org_id,
                lease.item_id,
                lease.token,
                lease.run_id,
                f"{KEY}{opened.name}",
                opened.name,
                lease.attempt,
                int(Duty.SECRETS),
                opened.version,
            )
        if not is_held:
            raise LeaseLost("the lease is gone")
        self._scope.hints.changed([lease.run_id])


class Reopening:
    """Opens secrets for the replay of a run: those that it opened before, and noting nothing.

    What it did not open it is refused, as it was; where it would not be, its way ends soon after.
    """

    def __init__(self, claimed: Claimed, scope: Scope, values: Mapping[str, str]) -> None:
        self._claimed = claimed
        self._scope = scope
        self._values = values

    async def open(self, name: str) -> str:
        """Return a secret's value; raises NotFound, Forbidden, Permanent."""
        if name in self._values:
            return self._values[name]
        vault, drawn = self._scope.vault, veil.current()
        if vault is None or drawn is None:
            raise _no_vault()
        backing, right = self._claimed.backing, right_of(self._scope.asking, self._claimed)
        if backing is not None and backing.lent is not None:
            raise _lent()
        while True:  # a replay ends by itself
            try:
                if right is not None and (refused := await right.refusal()) is not None:
                    raise refused
                opened = await vault.open(self._claimed.lease.org_id, name, is_use=False)
            except Transient:
                await asyncio.sleep(_AGAIN_S)
            else:
                drawn.add(name, opened.value)
                return opened.value


async def reopened(claimed: Claimed, scope: Scope, recorded: History) -> Reopening:
    """Open again what a run has opened by its history; what is gone has its name for a value. Raises Transient."""
    values: dict[str, str] = {}
    vault, drawn = scope.vault, veil.current()
    names = [one.name for key, one in recorded.items() if key.startswith(KEY)]
    if vault is None or drawn is None:
        return Reopening(claimed, scope, values)
    for name in names:
        try:
            opened = await vault.open(claimed.lease.org_id, name, is_use=False)
        except Permanent:
            values[name] = await named(name)
            continue
        drawn.add(name, opened.value)
        values[name] = opened.value
    return Reopening(claimed, scope, values)


async def named(name: str) -> str:
    """Return what stands in place of a secret's value."""
    return f"[secret:{name}]"


def _lent() -> Forbidden:
    return Forbidden(
        "this run was started under a grant, which opens no secrets",
        code="secret_lent",
        advice="let somebody of the organization rerun the run",
        details={"reason": "secret_lent"},
    )


def _no_vault() -> Permanent:
    return Permanent("secrets are opened by the tasks of a run on a worker", code="no_secrets_here")


async def draw_again(claimed: Claimed, scope: Scope, duties: int) -> bool:
    """Veil what earlier attempts of the run opened; what is gone or does not open can come from nowhere.

    `duties` are those of the run. Returns False, after a while, where something would open elsewhere: the run must
    not go on here unveiled. Raises Transient while the database is away.
    """
    drawn, vault, lease = veil.current(), scope.vault, claimed.lease
    if not duties & Duty.SECRETS or drawn is None or vault is None:
        return True
    async with scope.database.statement("secrets") as con:
        rows = await con.fetch(_SQL["opened"], lease.org_id, lease.run_id)
    for row in rows:
        try:
            opened = await vault.open(lease.org_id, row["name"], is_use=False)
        except Unavailable:
            raise
        except Transient as error:
            _log.error("secret.not_opened", run_id=str(lease.run_id), code=error.code)
            await asyncio.sleep(_ELSEWHERE_S)
            return False
        except Permanent as error:
            _log.warning("secret.not_veiled", run_id=str(lease.run_id), code=error.code)
            continue
        drawn.add(opened.name, opened.value)
    return True
