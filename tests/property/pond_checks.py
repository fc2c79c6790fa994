"""What holds in the database after every rule of the state machine, whatever the rules were."""

from __future__ import annotations

from tests.property.pond_model import SLOTS, Model

from millpond.db.pool import Connection

_LEASES = """
select l.item_id, l.worker_id, l.token = i.token and i.state = 'running' and l.attempt = i.attempt as is_right
from lease l left join item i using (org_id, item_id)
"""
# Ready rows that no claim would come to: their lane (or its org) is asleep or read from a later rank.
_OUT_OF_REACH = """
select r.item_id, r.rank, l.cursor_rank, l.active, s.active as share_active from ready r
left join lane l using (org_id, lane_id)
left join share s on s.org_id = l.org_id and s.queue = l.queue
where not coalesce(l.active and s.active and l.cursor_rank <= r.rank, false)
  and not exists (select from arrival a
                  where a.org_id = r.org_id and a.lane_id = r.lane_id and a.min_rank <= r.rank)
"""
# Active orgs that no claim would come to: they stand before the place from which orgs are read.
_PASSED = """
select s.org_id, s.queue, s.virtual_s, c.least_s, c.virtual_s as clock_s from share s join fair_clock c using (queue)
where s.active and s.virtual_s < c.least_s or c.least_s > c.virtual_s
"""
# Orgs, or clocks, of a queue that are there twice: no index refuses that.
_TWICE = """
select org_id, queue from share group by 1, 2 having count(*) > 1
union all select 0, queue from fair_clock group by 2 having count(*) > 1
"""


async def check(con: Connection, model: Model) -> None:
    """Raise AssertionError at the first difference between the model and the database."""
    await _check_items(con, model)
    await _check_leases(con, model)
    await _check_queue(con)
    await _check_history(con, model)


async def _check_items(con: Connection, model: Model) -> None:
    rows = await con.fetch(
        "select item_id, state, attempt, deaths, cancel_requested, event_no from item"
    )
    assert {row["item_id"]: tuple(row)[1:] for row in rows} == {
        run.run_id: (run.state, run.attempt, run.deaths, run.is_cancel_requested, len(run.kinds))
        for run in model.runs.values()
        if run.is_live
    }
    ended = await con.fetch("select run_id, outcome, attempts from run where outcome is not null")
    assert {row["run_id"]: tuple(row)[1:] for row in ended} == {
        run.run_id: (run.state, run.attempt) for run in model.runs.values() if not run.is_live
    }
    timers = await con.fetch("select run_id, step_key, kind from timer")
    assert {tuple(row) for row in timers} == {
        (run.run_id, key, kind) for run in model.runs.values() for key, kind in run.timers.items()
    }


async def _check_leases(con: Connection, model: Model) -> None:
    rows = await con.fetch(_LEASES)
    assert all(row["is_right"] for row in rows), "a lease without its token on the live row"
    assert {row["item_id"]: row["worker_id"] for row in rows} == {
        run.run_id: run.worker_id for run in model.of("running")
    }
    assert len(rows) == len(model.of("running")), "two leases of one work item"
    for worker in model.workers:
        assert sum(row["worker_id"] == worker.worker_id for row in rows) <= SLOTS


async def _check_queue(con: Connection) -> None:
    rows = await con.fetch("select org_id, lane_id, rank, item_id from ready order by 4")
    queued = await con.fetch(
        "select org_id, lane_id, rank, item_id from item where state = 'queued' order by 4"
    )
    assert rows == queued, "ready rows are not exactly those of queued work items"
    lost = await con.fetch(_OUT_OF_REACH)
    assert not lost, f"no claim comes to {lost}"
    await check_order(con)


async def check_order(con: Connection) -> None:
    """Raise AssertionError where the fair order has somebody twice, or is read from behind somebody."""
    passed = await con.fetch(_PASSED)
    assert not passed, f"no claim comes to {passed}"
    twice = await con.fetch(_TWICE)
    assert not twice, f"twice: {twice}"


async def _check_history(con: Connection, model: Model) -> None:
    rows = await con.fetch(
        "select run_id, array_agg(event_no order by event_no) as numbers,"
        " array_agg(kind order by event_no) as kinds from event group by run_id"
    )
    assert all(row["numbers"] == list(range(1, len(row["numbers"]) + 1)) for row in rows), "a gap"
    assert {row["run_id"]: row["kinds"] for row in rows} == {
        run.run_id: run.kinds for run in model.runs.values()
    }
    steps = await con.fetch("select run_id, step_key, state, output::text from step")
    assert {(row["run_id"], row["step_key"]): row["state"] for row in steps} == {
        (run.run_id, key): state for run in model.runs.values() for key, state in run.steps.items()
    }
    outputs = {(row["run_id"], row["step_key"]): row["output"] for row in steps}
    for run in model.runs.values():
        for key, output in run.outputs.items():
            assert outputs[run.run_id, key] == output, "a recorded result has changed"
    pending = await con.fetch("select request_id from input_request where state = 'pending'")
    assert {row["request_id"] for row in pending} == {
        run.request_id for run in model.runs.values() if run.request_id is not None
    }
