"""Accepting many runs at once: all of them in one transaction, or none.

Called by `POST /v1/runs/batch`. Invariants: every bad wish is named by its place and nothing is stored;
a repeat under the same Idempotency-Key returns the first ids.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import ValidationError

from millpond.api.accept import (
    find_answer,
    hint_replaced,
    intent_of,
    note_answer,
    paid,
    permit_start,
)
from millpond.api.auth import Caller, permit
from millpond.api.batches import Promise, claim_keys
from millpond.api.models import StartRun
from millpond.api.problems import faults_of
from millpond.db.pool import Connection
from millpond.engine import dedup
from millpond.engine.dedup import Settled
from millpond.engine.fitting import has_need, misfits
from millpond.engine.quotas import Ticket
from millpond.engine.submit import check, submit
from millpond.errors import Conflict, Forbidden, InvalidInput, NotFound
from millpond.types import Intent, Json

MAX_BODY_BYTES = 16 * 1024 * 1024
_MAX_FAULTS_EACH = 5
_NAMED = 3

Fault = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a batch asked for came to: the answer, and whether it was given before."""

    answer: Json
    is_repeat: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    nth: int
    wish: StartRun
    intent: Intent


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """What was stored: the new runs, and those that they took their keys from."""

    answer: Json
    new: Sequence[Intent]
    replaced: Sequence[uuid.UUID | None]


async def accept_batch(
    caller: Caller, parts: Sequence[Json], promise: Promise | None, traceparent: str | None
) -> Batch:
    """Validate every wish and store all runs; raises InvalidInput that names each bad one."""
    entries, faults = await _read(caller, parts, traceparent)
    if faults:
        first = await _first(caller, promise)
        if first is None:
            raise _invalid(faults, len(parts))
        return first
    return await _store(caller, entries, promise)


async def _read(
    caller: Caller, parts: Sequence[Json], traceparent: str | None
) -> tuple[list[_Entry], list[Fault]]:
    """Return the wishes with their intents, and what is wrong with the others."""
    entries: list[_Entry] = []
    faults: list[Fault] = []
    places: dict[str, int] = {}
    for nth, part in enumerate(parts):
        try:
            entry = await _entry(caller, nth, part, traceparent)
            if (key := entry.intent.dedup_key) is not None and (
                before := places.setdefault(key, nth)
            ) != nth:
                raise InvalidInput(f"runs[{before}] has this key", param="dedup_key")
        except ValidationError as error:
            faults += _placed(nth, faults_of(error.errors(include_url=False, include_input=False)))
        except (InvalidInput, NotFound, Forbidden) as error:
            faults += _placed(nth, _faults(error))
        else:
            entries.append(entry)
    if any(has_need(entry.intent) for entry in entries):
        async with caller.org() as con:
            found = await misfits(con, caller.org_id, [entry.intent for entry in entries])
        for nth, misfit in found:
            faults += _placed(entries[nth].nth, _faults(misfit))
    return entries, faults


async def _entry(caller: Caller, nth: int, part: Json, traceparent: str | None) -> _Entry:
    wish = StartRun.model_validate(part)
    catalog = caller.ports.catalog
    flow = await catalog.flow(wish.flow, wish.version)
    permit_start(caller.principal, flow)
    if wish.on_duplicate == "cancel_old":
        permit(caller.principal, "runs:cancel", param="on_duplicate")
    intent = intent_of(caller, wish, flow, traceparent)
    await catalog.check_queue(intent.queue, flow)
    catalog.check_input(flow, wish.input)
    check(intent, caller.org_id)
    return _Entry(nth=nth, wish=wish, intent=intent)


async def _store(caller: Caller, entries: Sequence[_Entry], promise: Promise | None) -> Batch:
    """Store all runs in one transaction, with the answer if it was promised."""

    async def work(ticket: Ticket) -> Batch | _Stored:
        return await _commit(caller, entries, promise, ticket)

    stored = await paid(caller, len(entries), work)
    if isinstance(stored, Batch):
        return stored
    hint_replaced(caller, stored.replaced)
    caller.ports.hints.wake({intent.queue for intent in stored.new if intent.delay_s <= 0})
    return Batch(answer=stored.answer)


async def _commit(
    caller: Caller, entries: Sequence[_Entry], promise: Promise | None, ticket: Ticket
) -> Batch | _Stored:
    async with caller.org() as con:
        if promise is not None:
            wanted = [(entries[0].intent, promise)]
            if not await claim_keys(con, caller.org_id, wanted):
                return await _repeat(con, caller, promise)
        settled = await _settle_keys(con, caller.org_id, entries)
        joined = {nth: one.joined for nth, one in settled.items() if one.joined is not None}
        new = [entry.intent for entry in entries if entry.nth not in joined]
        await submit(con, new, ticket)
        ids = [
            str(joined[entry.nth].run_id if entry.nth in joined else entry.intent.run_id)
            for entry in entries
        ]
        answer = {"object": "run_batch", "ids": ids, "joined": sorted(joined)}
        if promise is not None:
            first = entries[0].intent.run_id
            text = orjson.dumps(answer).decode()
            await note_answer(con, caller.principal, promise, first, text)
    return _Stored(answer=answer, new=new, replaced=[one.replaced for one in settled.values()])


async def _settle_keys(
    con: Connection, org_id: int, entries: Sequence[_Entry]
) -> dict[int, Settled]:
    """Take the deduplication keys: the free ones together, then those of live runs, in key order."""
    keyed = [entry for entry in entries if entry.intent.dedup_key is not None]
    got = await dedup.take(con, org_id, [entry.intent for entry in keyed])
    held = [entry for entry in keyed if entry.intent.run_id not in got]
    settled = {}
    for entry in sorted(held, key=lambda one: one.intent.dedup_key or ""):
        try:
            settled[entry.nth] = await dedup.settle(con, entry.intent, entry.wish.on_duplicate)
        except Conflict as error:
            raise Conflict(
                f"runs[{entry.nth}]: {error.message}",
                code=error.code,
                param=f"runs[{entry.nth}].dedup_key",
                advice=error.advice,
                details=error.details,
            ) from error
    return settled


async def _first(caller: Caller, promise: Promise | None) -> Batch | None:
    """Return what a key was answered with before, when the batch would not be accepted now."""
    if promise is None:
        return None
    async with caller.org() as con:
        answer = await find_answer(con, caller.principal, promise)
    return None if answer is None else Batch(answer=answer, is_repeat=True)


async def _repeat(con: Connection, caller: Caller, promise: Promise) -> Batch:
    answer = await find_answer(con, caller.principal, promise)
    assert answer is not None
    return Batch(answer=answer, is_repeat=True)


def _faults(error: InvalidInput | NotFound | Forbidden) -> list[Fault]:
    named = error.details.get("errors")
    if isinstance(named, list):
        return named
    return [{"param": error.param, "code": error.code, "message": error.message}]


def _placed(nth: int, faults: Sequence[Fault]) -> Iterator[Fault]:
    """Name faults by the place of their wish; of one with very many, the first few."""
    for fault in faults[:_MAX_FAULTS_EACH]:
        inner = f".{fault['param']}" if fault["param"] else ""
        yield {**fault, "param": f"runs[{nth}]{inner}"}


def _invalid(faults: Sequence[Fault], total: int) -> InvalidInput:
    bad = len({fault["param"].partition("]")[0] for fault in faults})
    named = "; ".join(f"{fault['param']}: {fault['message']}" for fault in faults[:_NAMED])
    more = "; …" if len(faults) > _NAMED else ""
    return InvalidInput(
        f"{bad} of {total} runs are not valid, so none was accepted: {named}{more}",
        code="batch_invalid",
        param=faults[0]["param"],
        details={"errors": list(faults)},
    )
