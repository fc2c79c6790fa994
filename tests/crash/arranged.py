"""What some commit points need beside the mixed work: orphans, due schedules and groups, old runs.

Called by test_crashes.py before its worker starts. Each returns what must hold in the end: a condition on
table `run` and how many rows fulfil it, so that nothing is started twice or left out.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping

import orjson
from tests.crash.flows import REGISTRY
from tests.crash.workload import People, intent
from tests.engine.conftest import Pond

from millpond.engine import inbound, schedules, triggers
from millpond.engine.claim import Claimer
from millpond.engine.operations import cancel
from millpond.engine.payloads import MAX_BYTES

Promise = tuple[str, int]
# More than a run takes as its input, so that starting it fails.
_TOO_MUCH = "x" * (MAX_BYTES + 1)


async def crowd(pond: Pond, people: People) -> Promise:
    """Let more be ready than has room, so that claims decide."""
    runs = [intent(people.org_id, "crash.steps", labels={"crowd": "yes"}) for _ in range(120)]
    await people.submit(runs)
    return "labels->>'crowd' = 'yes'", 120


async def old_meter(pond: Pond, people: People) -> Promise:
    """Leave the meter of a rate that is past."""
    async with pond.engine_db.duty("test") as con:
        await con.execute("insert into meter (room, tat_us) values ('rate:gone', 1)")
    return "false", 0


async def unlimited_tokens(pond: Pond, people: People) -> Promise:
    """Leave a reservation of a limit on tokens that is gone."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into reservation (org_id, item_id, token, room, capability, tokens, parts, carried)"
            " values ($1, $2, $2, 'tokens 0 0 provider:gone', 'gone@1', 1, '{}', '{}')",
            *(people.org_id, uuid.uuid4()),
        )
    return "false", 0


async def old_room(pond: Pond, people: People) -> Promise:
    """Leave the room of a step whose lease is gone."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into step_lease (org_id, item_id, step_key, token, keys)"
            " values ($1, $2, 'gone', $2, '{provider:gone}')",
            *(people.org_id, uuid.uuid4()),
        )
    return "false", 0


async def old_crossing(pond: Pond, people: People) -> Promise:
    """Leave a room that several queues needed, under which nothing stands any more."""
    async with pond.engine_db.duty("test") as con:
        await con.execute("insert into crossing (room, virtual_s) values ('gone', 0)")
    return "false", 0


async def old_look(pond: Pond, people: People) -> Promise:
    """Let somebody have looked how full all is, a while ago."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into sampling (at) values (clock_timestamp() - interval '1 minute')"
        )
    return "false", 0


async def braked_look(pond: Pond, people: People) -> Promise:
    """Let that be where there is something to be looked at of limits."""
    await old_look(pond, people)
    return await braked(pond, people)


async def old_text(pond: Pond, people: People) -> Promise:
    """Leave text that a step of a run that is no more has shown."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into delta (org_id, run_id, step_key, attempt, tries, n, item_id, text, at)"
            " values ($1, $2, 'gone', 1, 0, 1, $2, 'x', clock_timestamp() - interval '1 day')",
            *(people.org_id, uuid.uuid4()),
        )
    return "false", 0


async def old_brake(pond: Pond, people: People) -> Promise:
    """Leave a brake that has worn off."""
    await _brake(pond, "provider:gone", opened_us=None)
    return "false", 0


async def braked(pond: Pond, people: People) -> Promise:
    """Leave breakers that let probes go, and a run with a step that succeeds, and one throttled and failing first."""
    await _brake(pond, "provider:crash", opened_us=1)
    await _brake(pond, "provider:answers", opened_us=1, step="crash.answered")
    await people.submit([intent(people.org_id, "crash.braked", labels={"braked": "yes"})])
    return "labels->>'braked' = 'yes' and outcome = 'succeeded'", 1


async def _brake(
    pond: Pond, key: str, *, opened_us: int | None, step: str = "crash.throttled"
) -> None:
    """Store a brake whose time is past: over, or one that is open and lets probes go."""
    ends = "extract(epoch from clock_timestamp())::bigint * 1000000" if opened_us else "1"
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into brake (owner, key, until_us, factor, in_use, hits, opened_us, over_us, step, reason)"
            f" select 0, $1, n.us, 0.5, 1, 1, $2, n.us + $3, $4, 'down' from (select {ends} as us) n",
            *(key, opened_us, 3_600_000_000 if opened_us else 0, step),
        )
        await con.execute("select limit_changed(0, $1, 'brake')", key)


async def orphan(pond: Pond, people: People) -> Promise:
    """Leave a run under the lease of a worker that is no more."""
    await people.submit([intent(people.org_id, "crash.steps", labels={"orphan": "yes"})])
    worker_id = uuid.uuid4()
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into worker (worker_id, host, pid, queues, capabilities, expires_at)"
            " values ($1, 'gone', 1, '{}', '{}', clock_timestamp() + interval '1 hour')",
            worker_id,
        )
    able = [flow.capability for flow in REGISTRY.flows.values()]
    claimer = Claimer(
        pond.engine_db, worker_id=worker_id, capabilities=able, estimate_s=lambda _: 1.0
    )
    claimed, _ = await claimer.claim({"default": 1})
    assert len(claimed) == 1
    await expire(pond, "gone")
    return "labels->>'orphan' = 'yes' and attempts >= 2", 1


async def expire(pond: Pond, host: str = "") -> None:
    """Let the lease time of workers pass at once: of one host, or of all."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update worker set expires_at = clock_timestamp() - interval '1 second'"
            " where $1 in (host, '')",
            host,
        )


async def due_schedule(pond: Pond, people: People) -> Promise:
    """Let a schedule be due, once for years."""
    await _schedule(pond, "sound", None)
    return _started_by("millpond.schedule")


async def broken_schedule(pond: Pond, people: People) -> Promise:
    """Let two schedules be due, of which one cannot start its run."""
    await _schedule(pond, "broken", _TOO_MUCH)
    return await due_schedule(pond, people)


async def _schedule(pond: Pond, name: str, data: str | None) -> None:
    draft = schedules.Draft(name=name, flow="crash.takes", cron="@yearly", input=data)
    async with pond.db.org(pond.org_id) as con:
        made = await schedules.create(con, pond.org_id, draft, "user:ann")
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update schedule set next_due_at = date_trunc('year', clock_timestamp())"
            " where schedule_id = $1",
            made.schedule_id,
        )


async def due_group(pond: Pond, people: People) -> Promise:
    """Let a gathered event be due."""
    await _group(pond, "sound", None)
    return _started_by("millpond.trigger")


async def broken_group(pond: Pond, people: People) -> Promise:
    """Let gathered events of two triggers be due, of which one cannot start its run."""
    await _group(pond, "broken", _TOO_MUCH)
    return await due_group(pond, people)


async def _group(pond: Pond, name: str, note: str | None) -> None:
    draft = triggers.Draft(
        name=name, event=name, flow="crash.takes", mode="debounce", period_s=3600.0
    )
    await _publish_takes(pond)
    event = inbound.Incoming(event_id=f"event-{name}", name=name, data={})
    async with pond.db.org(pond.org_id) as con:
        made = await triggers.create(con, pond.org_id, draft, "user:ann")
        await inbound.receive(con, pond.org_id, [event], "user:ann")
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update trigger_group set due_at = clock_timestamp() where trigger_id = $1",
            made.trigger_id,
        )
        if note is not None:
            events = [
                {"id": "1", "name": name, "data": note, "received_at": "2026-01-01T00:00:00Z"}
            ]
            await con.execute(
                "update trigger_group set events = $2 where trigger_id = $1",
                made.trigger_id,
                orjson.dumps(events).decode(),
            )


async def _publish_takes(pond: Pond) -> None:
    """Publish the flow as a worker does, since an event that arrives needs to know it."""
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "insert into flow_version (flow, version, queue, input_schema)"
            " values ('crash.takes', 1, 'default', '{}') on conflict do nothing"
        )


def _started_by(label: str) -> Promise:
    return f"labels->>'{label}' is not null", 1


async def old_run(pond: Pond, people: People) -> Promise:
    """Leave a run that has been over for longer than it is kept."""
    run_id = uuid.UUID("01800000-0000-7000-8000-000000000000")  # of April 2022
    await people.submit([intent(people.org_id, "crash.steps", run_id=run_id)])
    people.accepted.remove(run_id)
    async with pond.db.org(pond.org_id) as con:
        await cancel(con, pond.org_id, run_id, "user:ann")
    async with pond.engine_db.duty("test") as con:
        await con.execute(
            "update run set finished_at = clock_timestamp() - interval '9 days' where run_id = $1",
            run_id,
        )
    return f"run_id = '{run_id}'", 0


ARRANGED: Mapping[str, Callable[[Pond, People], Awaitable[Promise]]] = {
    "claim": crowd,
    "drop_meters": old_meter,
    "drop_over": old_brake,
    "drop_crossings": old_crossing,
    "step_sweep": old_room,
    "sample": old_look,
    "sample_limits": braked_look,
    "forget_deltas": old_text,
    "drop_reservations": unlimited_tokens,
    **dict.fromkeys(
        ("keys_of", "throttle", "trip", "opened_by", "reached", "failing", "failing_over"), braked
    ),
    "rescue": orphan,
    "schedule": due_schedule,
    "due_ids": broken_schedule,
    "schedule_alone": broken_schedule,
    "schedule_stopped": broken_schedule,
    "trigger": due_group,
    "due_groups": broken_group,
    "trigger_alone": broken_group,
    "trigger_dropped": broken_group,
    "retention": old_run,
    "prune": old_run,
}
