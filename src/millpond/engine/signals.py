"""Signals: what others send to a run, and `ctx.wait_event`, which takes them.

A part of `Context`; `send` is called by the API. Invariants: sending and waiting both lock the run's live
row first, and after each no wait is left that the untaken signals would end; a signal ends one wait.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar, overload

import orjson
from pydantic import TypeAdapter, ValidationError

from millpond.db.pool import Connection, EngineDatabase, Record
from millpond.db.queries import queries
from millpond.engine import waits
from millpond.engine.checkpoints import Checkpoints
from millpond.engine.duties import Duty
from millpond.engine.encoding import dump_error
from millpond.engine.events import Fact, append
from millpond.engine.history import Recorded, just
from millpond.engine.leases import Lease, hold
from millpond.engine.plans import StepFailed
from millpond.engine.waits import Readied
from millpond.errors import Conflict, InvalidInput, NotFound, Permanent
from millpond.types import Json

A = TypeVar("A")
_SQL = queries("signals")
_WAITS = queries("waits")
_OPERATIONS = queries("operations")
MAX_SIGNAL_BYTES = 256 * 1024
# What can name a step too: a wait's step is named after its first signal.
NAME_PATTERN = r"^[\w.\- ]{1,200}$"
_NAME = re.compile(NAME_PATTERN)
_MAX_NAMES = 100
_MAX_TIMEOUT_S = 366 * 86_400.0 * 10
_NO_DEFAULT: Any = object()


class SignalTimedOut(StepFailed):
    """No signal came in time, and the wait had no default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal(Generic[A]):
    """What was sent to a run: `sent_by` is the subject of its sender."""

    name: str
    data: A
    sent_by: str
    sent_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A signal as stored; `readied` is its run, with a queue to hint where it may go on."""

    signal_id: uuid.UUID
    run_id: uuid.UUID
    name: str
    sent_at: datetime
    readied: Readied


class Signals(Checkpoints):
    """The call that waits for signals."""

    @overload
    async def wait_event(
        self, *names: str, timeout_s: float | None = ..., output: type[A]
    ) -> Signal[A]: ...

    @overload
    async def wait_event(self, *names: str, timeout_s: float | None = ...) -> Signal[Json]: ...

    @overload
    async def wait_event(
        self, *names: str, all: Literal[True], timeout_s: float | None = ..., output: type[A]
    ) -> tuple[Signal[A], ...]: ...

    @overload
    async def wait_event(
        self, *names: str, all: Literal[True], timeout_s: float | None = ...
    ) -> tuple[Signal[Json], ...]: ...

    @overload
    async def wait_event(
        self, *names: str, default: Any, timeout_s: float, all: bool = ..., output: Any = ...
    ) -> Any: ...

    async def wait_event(
        self,
        *names: str,
        timeout_s: float | None = None,
        all: bool = False,
        output: Any = None,
        default: Any = _NO_DEFAULT,
    ) -> Any:
        """Wait, holding nothing, for a signal of one of these names; with `all` for one of each.

        Signals sent earlier count, oldest first; each ends one wait. Returns the signal, or with `all`
        a tuple in the order of the names. `output` is the type of their data. After `timeout_s` it
        returns `default`; without one it raises SignalTimedOut.
        """
        wanted = _checked(names, timeout_s)
        key = self._branches.here().key(wanted[0])
        place = self._branches.place(key)
        recorded = await self._outcome_of(
            key,
            "signal",
            lambda: _record_wait(
                self._scope.database,
                self._lease,
                step_key=key,
                seq=place,
                names=wanted,
                is_all=all,
                timeout_s=timeout_s,
            ),
        )
        if recorded.state == "failed":
            if default is not _NO_DEFAULT:
                return default
            raise _timed_out(wanted, recorded)
        found = {one["name"]: one for one in orjson.loads(recorded.output or "[]")}
        adapter = None if output is None else TypeAdapter(output)
        signals = tuple(_signal(found[name], adapter) for name in wanted if name in found)
        return signals if all else signals[0]


def _checked(names: Sequence[str], timeout_s: float | None) -> list[str]:
    if not 1 <= len(names) <= _MAX_NAMES or len(set(names)) < len(names):
        raise InvalidInput(f"wait_event takes 1 to {_MAX_NAMES} names, each once", param="names")
    for name in names:
        check_name(name)
    if timeout_s is not None and not 0 <= timeout_s <= _MAX_TIMEOUT_S:
        raise InvalidInput("timeout_s is from 0 to ten years", param="timeout_s")
    return list(names)


def check_name(name: str) -> None:
    """Raise InvalidInput unless `name` can name a signal."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} cannot name a signal: 1 to 200 letters, digits and ._- and blanks are expected",
            param="name",
        )


def _timed_out(names: Sequence[str], recorded: Recorded) -> SignalTimedOut:
    error = orjson.loads(recorded.error or "{}")
    return SignalTimedOut(
        names[0],
        error_class="SignalTimedOut",
        code=str(error.get("code", "")),
        message=f"{error.get('message', '')}: {', '.join(names)}",
    )


def _signal(told: Json, adapter: TypeAdapter[Any] | None) -> Signal[Any]:
    data = told["data"]
    try:
        data = data if adapter is None else adapter.validate_json(orjson.dumps(data))
    except ValidationError as error:
        raise Permanent(
            f"the data of the signal {told['name']} does not fit: {dump_error(error)['message']}",
            code="signal_mismatch",
        ) from error
    return Signal(
        name=told["name"],
        data=data,
        sent_by=told["sent_by"],
        sent_at=datetime.fromisoformat(told["sent_at"]),
    )


async def _record_wait(
    database: EngineDatabase,
    lease: Lease,
    *,
    step_key: str,
    seq: int | None,
    names: Sequence[str],
    is_all: bool,
    timeout_s: float | None,
) -> Recorded | None:
    """Store a wait, with the timer that ends it; one that was sent all it wants is over at once."""
    org_id, run_id = lease.org_id, lease.run_id
    wants = orjson.dumps({"names": names, "all": is_all}).decode()
    async with database.duty("signal") as con:
        await hold(con, lease)
        is_new = await con.fetchval(
            _SQL["record_wait"], org_id, run_id, step_key, names[0], lease.attempt, wants, seq
        )
        if not is_new:  # stored by a commit whose answer was lost
            row = await con.fetchrow(_SQL["ended"], org_id, run_id, step_key)
            if row is None:
                return None
            return just("signal", row["state"], row["output"], row["error"])
        facts = [Fact("signal.awaited", step_key, {"names": names})]
        output = await _take(con, org_id, run_id, step_key, names, is_all=is_all)
        if output is None and timeout_s is not None:
            await con.fetchval(_WAITS["set_timer"], org_id, run_id, step_key, "signal", timeout_s)
        if output is not None:
            facts.append(Fact("signal.taken", step_key, {"names": _named(output)}))
        await append(con, org_id, run_id, facts, duties=Duty.WAITS)
    return None if output is None else just("signal", "done", orjson.dumps(output).decode(), None)


async def _take(
    con: Connection,
    org_id: int,
    run_id: uuid.UUID,
    step_key: str,
    names: Sequence[str],
    *,
    is_all: bool,
) -> list[Json] | None:
    """End a wait with the signals that it takes; None when they are not all there."""
    rows = await con.fetch(_SQL["take"], org_id, run_id, step_key, list(names), is_all)
    if not rows:
        return None
    output = [_told(row) for row in rows]
    text = orjson.dumps(output).decode()
    await con.fetchrow(_WAITS["end_wait"], org_id, run_id, step_key, "done", text, None)
    await con.execute(_WAITS["drop_timer"], org_id, run_id, step_key)
    return output


def _told(row: Record) -> Json:
    return {
        "name": row["name"],
        "data": orjson.loads(row["data"]),
        "sent_by": row["sent_by"],
        "sent_at": row["created_at"].isoformat(),
    }


def _named(output: Sequence[Json]) -> list[str]:
    return [one["name"] for one in output]


async def send(
    con: Connection,
    org_id: int,
    run_id: uuid.UUID,
    *,
    signal_id: uuid.UUID,
    name: str,
    data: Json,
    subject: str,
) -> Sent:
    """Store a signal to a live run and end the oldest wait that it completes.

    The caller commits, then hints. Raises NotFound, Conflict when the run has ended, and InvalidInput.
    """
    check_name(name)
    text = orjson.dumps(data).decode()
    if len(text.encode()) > MAX_SIGNAL_BYTES:
        raise InvalidInput(
            f"a signal carries at most {MAX_SIGNAL_BYTES} bytes of data",
            param="data",
            code="too_large",
        )
    await _lock_live(con, org_id, run_id)
    sent_at = await con.fetchval(_SQL["send"], org_id, run_id, signal_id, name, text, subject)
    told = {"name": name, "signal_id": str(signal_id), "sent_by": subject}
    received = Fact("signal.received", None, told)
    readied = Readied(org_id=org_id, run_id=run_id, queue="")
    await append(con, org_id, run_id, [received])
    for row in await con.fetch(_SQL["waits"], org_id, run_id, name):
        wants = orjson.loads(row["input"])
        output = await _take(
            con, org_id, run_id, row["step_key"], wants["names"], is_all=wants["all"]
        )
        if output is not None:
            fact = Fact("signal.taken", row["step_key"], {"names": _named(output)})
            readied = await waits.wake_waiting(con, org_id, run_id, fact)
            break
    return Sent(signal_id=signal_id, run_id=run_id, name=name, sent_at=sent_at, readied=readied)


async def sent(con: Connection, org_id: int, run_id: uuid.UUID, signal_id: uuid.UUID) -> Sent:
    """Return a signal that was sent before; raises NotFound when it is gone."""
    row = await con.fetchrow(_SQL["sent"], org_id, run_id, signal_id)
    if row is None:
        raise NotFound(f"signal {signal_id} does not exist", param="signal_id")
    readied = Readied(org_id=org_id, run_id=run_id, queue="")
    return Sent(
        signal_id=signal_id,
        run_id=run_id,
        name=row["name"],
        sent_at=row["created_at"],
        readied=readied,
    )


async def _lock_live(con: Connection, org_id: int, run_id: uuid.UUID) -> None:
    if await con.fetchrow(_WAITS["lock_run"], org_id, run_id) is not None:
        return
    row = await con.fetchrow(_OPERATIONS["outcome"], org_id, run_id)
    if row is None:
        raise NotFound(f"run {run_id} does not exist", param="run_id")
    raise Conflict(f"run {run_id} is already {row['outcome']}", code="already_finished")
