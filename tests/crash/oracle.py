"""What must hold once everything has ended, whatever was killed meanwhile.

Every accepted run ended exactly once; no recorded step ran again; no effect came under two keys; events have
no gaps; nothing live is left, of steps in other queues neither; big values are there for the rows that lack
them, and no others. Reads as the engine's role; called at the end of crash and chaos tests.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Collection

import orjson
from tests.crash.sink import Call, Sink

from millpond.db.pool import Connection, EngineDatabase, Record

FINAL = ("run.succeeded", "run.failed", "run.cancelled")
# Rows that must not outlive their run.
LIVE = ("item", "ready", "lease", "timer", "chore", "live_key", "step_need")


async def check(
    database: EngineDatabase,
    sink: Sink,
    accepted: Collection[uuid.UUID],
    *,
    claims_may_be_lost: bool = False,
) -> None:
    """Raise AssertionError naming what does not hold.

    `claims_may_be_lost`: Postgres was cut, and with it claims whose commit was not on disk; such an
    attempt's number is given again.
    """
    async with database.duty("oracle") as con:
        runs = await con.fetch(
            "select run_id, flow, outcome, output::text as output, error::text as error, continued_to"
            " from run"
        )
        known = {row["run_id"] for row in runs}
        assert known >= set(accepted), f"lost: {set(accepted) - known}"
        unended = [row["run_id"] for row in runs if row["outcome"] is None]
        assert not unended, f"never ended: {unended}"
        await _check_events(con, runs)
        for table in LIVE:
            left = await con.fetch(f"select * from {table}")
            assert not left, f"{table} has {len(left)} rows left, such as {left[0]}"
        pending = await con.fetchval("select count(*) from input_request where state = 'pending'")
        assert pending == 0, "questions of ended runs are still open"
        await _check_payloads(con)
        steps = await con.fetch(
            "select org_id, run_id, step_key, name, kind, state, attempt, tries from step"
        )
    _check_outputs(runs)
    _check_steps(steps, sink, may_repeat_attempts=claims_may_be_lost)


async def _check_events(con: Connection, runs: list[Record]) -> None:
    rows = await con.fetch(
        "select run_id, array_agg(event_no order by event_no) as numbers,"
        " array_agg(kind order by event_no) as kinds from event group by run_id"
    )
    events = {row["run_id"]: row for row in rows}
    for run in runs:
        told = events[run["run_id"]]
        kinds = told["kinds"]
        assert told["numbers"] == list(range(1, len(kinds) + 1)), f"a gap in {told}"
        finals = [kind for kind in kinds if kind in FINAL]
        assert finals == [f"run.{run['outcome']}"] == kinds[-1:], f"{run['run_id']}: {kinds}"
    repeated = await con.fetch(
        "select run_id, step_key from event where kind in ('step.succeeded', 'sleep.ended')"
        " group by run_id, step_key having count(*) > 1"
    )
    assert not repeated, f"recorded twice: {repeated}"


async def _check_payloads(con: Connection) -> None:
    """Each big value belongs to a row whose column is null, and each such row has its value."""
    rows = await con.fetch(
        "with wanted as ("
        " select org_id, run_id, 'input' as slot from run where input is null"
        " union all select org_id, run_id, 'output' from run"
        "   where output is null and outcome = 'succeeded' and continued_to is null"
        " union all select org_id, run_id, 'step:' || step_key from step"
        "   where output is null and kind = 'step' and state = 'done'"
        " union all select org_id, run_id, 'args:' || step_key from step"
        "   where input is null and kind = 'step' and ref is not null and effect is null)"
        " select run_id, slot, w is null as is_leftover from wanted w"
        " full join payload p using (org_id, run_id, slot) where w is null or p is null"
    )
    assert not rows, f"payloads left over or missing: {rows}"


def _check_outputs(runs: list[Record]) -> None:
    """Every flow but those cancelled, or meant to fail, has come to its own end."""
    for run in runs:
        if run["outcome"] == "failed":
            error = orjson.loads(run["error"])
            meant = "Forbidden" if run["flow"] == "crash.revoked" else "Permanent"
            assert meant in (error["class"], error.get("cause")), run
        if run["outcome"] == "succeeded" and run["continued_to"] is None:
            assert orjson.loads(run["output"]), run


def _check_once(key: str, calls: list[Call]) -> None:
    """A `once` effect that has arrived is never asked for again.

    What arrives after it can only be the call of an earlier attempt whose process was stopped on the way
    to it, and which a person had meanwhile declared not done: nothing can stop that one.
    """
    attempts = [call.attempt for call in calls if call.is_once]
    assert attempts == sorted(set(attempts), reverse=True), f"{key}: repeated: {calls}"


def _check_steps(steps: list[Record], sink: Sink, *, may_repeat_attempts: bool) -> None:
    """No later attempt called for a step than the one that recorded it, and each effect has one key."""
    recorded = {f"{row['org_id']}:{row['run_id']}:{row['step_key']}": row for row in steps}
    for key, calls in sink.calls_by_key().items():
        step = recorded.get(key)
        _check_once(key, calls)
        if step is None or step["state"] not in ("done", "failed"):
            continue
        last = max(call.attempt for call in calls)
        assert last <= step["attempt"], f"{key}: recorded by {step['attempt']}, run by {last}"
        executions = {(call.pid, call.execution) for call in calls if call.execution}
        assert may_repeat_attempts or len(executions) <= step["attempt"], (
            f"{key}: recorded by claim {step['attempt']}, executed by {executions}"
        )
        tries = {(call.attempt, call.try_number, call.pid, call.execution) for call in calls}
        assert may_repeat_attempts or len(tries) == len(calls), f"{key}: a try ran twice: {calls}"
    keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    for call in sink.calls:
        keys[call.run_id, call.effect].add(call.key)
    twice = {effect: found for effect, found in keys.items() if len(found) > 1}
    assert not twice, f"an effect under two keys: {twice}"
    done = {key for key, row in recorded.items() if (row["kind"], row["state"]) == ("step", "done")}
    silent = done - sink.effects.keys()
    assert not silent, f"recorded without having happened: {silent}"
