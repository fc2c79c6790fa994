"""Rights: whether the subject of a run may still what it might when the run was accepted.

Called by `performing` and `step_tries` before every try of a step with an effect, and by `children` before
a child starts. Invariants: every answer is read from the database after it was asked for, so that no right that
was taken away is used after that; who cannot be asked about does not act; a refusal is audited once per step.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import orjson
import structlog

from millpond.db.pool import EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine.leases import Claimed, hold
from millpond.errors import Forbidden, Transient
from millpond.types import Backing

_SQL = queries("current_rights")
_log = structlog.get_logger("millpond.rights")
_BY_ITSELF = ("service:schedule:", "service:trigger:")
CODE = "right_revoked"
# How keys of what is undone and done on failure begin: names of steps hold no `!`, so that no flow can forge it.
ENDINGS = ("!undo/", "!failure/")
# What one question carries; those that wait meanwhile go with the next.
_MAX_BATCH = 256


class Holder(NamedTuple):
    """Somebody in an org; `lent` is the grant under which an operator acts there."""

    org_id: int
    subject: str
    lent: uuid.UUID | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a holder may now; `denied` is why that is nothing at all."""

    permissions: frozenset[str] = frozenset()
    denied: str | None = None


class Rights(Protocol):
    """Knows what people and programs may now."""

    async def held(self, holders: Sequence[Holder]) -> Sequence[Held]:
        """Return what each may at this moment, in order; raises Transient when it cannot be known."""
        ...


class Asking:
    """Asks for all steps of a worker that wait at the same time by one question, one after the other."""

    def __init__(self, rights: Rights | None) -> None:
        self._rights = rights
        self._waiting: dict[Holder, asyncio.Future[Held]] = {}
        self._task: asyncio.Task[None] | None = None

    async def held(self, holder: Holder) -> Held:
        """Return what a holder may now, nothing where nobody knows; raises Transient when that may change."""
        if self._rights is None:
            return Held(denied="not_asked")
        asked = self._waiting.get(holder)
        if asked is None:
            asked = self._waiting[holder] = asyncio.get_running_loop().create_future()
        if self._task is None:
            self._task = asyncio.create_task(self._ask_all(self._rights), name="rights")
        return await asyncio.shield(asked)

    async def close(self) -> None:
        """Stop asking; who still waits learns that it cannot be known."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _ask_all(self, rights: Rights) -> None:
        batch: dict[Holder, asyncio.Future[Held]] = {}
        try:
            await asyncio.sleep(0)  # whoever is about to ask in this turn of the loop goes along
            while self._waiting:
                batch = {one: self._waiting.pop(one) for one in list(self._waiting)[:_MAX_BATCH]}
                await _answer(rights, batch)
        finally:
            self._task = None
            for left in (*batch.values(), *self._waiting.values()):
                if not left.done():
                    _fail(left, Transient("this worker has stopped", code="rights_unknown"))
            self._waiting.clear()


async def _answer(rights: Rights, batch: Mapping[Holder, asyncio.Future[Held]]) -> None:
    try:
        answers = await rights.held(list(batch))
    except Exception as error:  # noqa: BLE001 - who cannot be asked about waits
        if not isinstance(error, Transient):
            _log.error("rights.unknown", error=type(error).__name__)
            error = Transient("rights cannot be asked about now", code="rights_unknown")
        for asked in batch.values():
            _fail(asked, error)
        return
    for asked, held in zip(batch.values(), answers, strict=True):
        asked.set_result(held)


def _fail(asked: asyncio.Future[Held], error: Exception) -> None:
    asked.set_exception(error)
    asked.exception()  # whoever asked may be gone


class Right:
    """The right by which one attempt's steps act; without a backing, none that a step itself needs."""

    def __init__(self, asking: Asking, claimed: Claimed, backing: Backing | None) -> None:
        self._asking = asking
        self._claimed = claimed
        self._backing = backing

    async def refusal(self, permission: str | None = None) -> Forbidden | None:
        """Return why a step that needs `permission` too must not act now, None where it may.

        Raises Transient when that cannot be known.
        """
        backing, claimed = self._backing, self._claimed
        if backing is None or not backing.is_asked:
            return (permission and _refusal(claimed.subject, "nobody_behind", permission)) or None
        holder = Holder(claimed.lease.org_id, claimed.subject, backing.lent)
        held = await self._asking.held(holder)
        if held.denied is not None:
            return _refusal(claimed.subject, held.denied, None)
        for word in [*(backing.permission or "").split(), *([permission] if permission else [])]:
            if word not in held.permissions:
                return _refusal(claimed.subject, "permission_gone", word)
        return None

    async def tell(
        self, database: EngineDatabase, step_key: str, name: str, refused: Forbidden
    ) -> None:
        """Store that a step was refused in the audit log, once; raises LeaseLost without the lease."""
        lease, details = self._claimed.lease, {"step": step_key, "name": name, **refused.details}
        async with database.duty("refuse") as con:
            await hold(con, lease)
            await con.execute(
                _SQL["refused"],
                lease.org_id,
                uuid.uuid5(lease.run_id, f"refused:{lease.org_id}:{step_key}"),
                self._claimed.subject,
                self._backing.granted_by if self._backing is not None else None,
                f"run:{lease.run_id}",
                lease.run_id,
                orjson.dumps(details).decode(),
            )


def right_of(asking: Asking, claimed: Claimed) -> Right | None:
    """Return the right by which the steps of a run act; None where there is nothing to ask.

    Runs of schedules and triggers have nobody whose rights could be asked: their steps get no permission.
    """
    is_by_itself = claimed.subject.startswith(_BY_ITSELF)
    is_asked = claimed.backing is not None and claimed.backing.is_asked
    if not is_asked and not is_by_itself:
        return None
    return Right(asking, claimed, claimed.backing)


def backing_of(row: Record) -> Backing | None:
    """Return the backing that stands in columns of a run; None where it has none."""
    if row["stamp"] is None:
        return None
    return Backing(row["stamp"], row["permission"], row["lent"], row["granted_by"])


def _refusal(subject: str, reason: str, permission: str | None) -> Forbidden:
    what = _REASONS.get(reason, "may not act here any more")
    more = {} if permission is None else {"permission": permission}
    return Forbidden(
        f"{subject}, for whom this run acts, {what}{f' {permission}' if permission else ''}",
        code=CODE,
        param=permission,
        advice="let somebody who may do it rerun the run",
        details={"reason": reason, **more},
    )


_REASONS: Mapping[str, str] = {
    "nobody_behind": "acts for nobody who could have the permission",
    "permission_gone": "does not have the permission any more:",
    "not_a_member": "is not a member of the organization any more",
    "account_disabled": "has a disabled account",
    "identity_disabled": "is disabled or gone",
    "key_ended": "is a key that was revoked or has expired",
    "grant_ended": "was let in by a grant that has ended",
    "not_asked": "cannot be asked about by this worker",
    "org_suspended": "belongs to an organization that is suspended",
}
