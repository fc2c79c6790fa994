-- Deadlines: runs that were not over in time.

-- name: due
-- Finds runs whose deadline has passed, earliest first.
select org_id, run_id from timer where kind = 'deadline' and due_at <= clock_timestamp() order by due_at limit $1;

-- name: lock
-- Locks live rows that nobody else holds.
select u.org_id, u.run_id, i.state, i.duties
from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
cross join lateral (select i.state, i.duties from item i where i.org_id = u.org_id and i.item_id = u.run_id
                    for update skip locked) i;

-- name: take
-- Removes the deadlines of locked runs; only those returned take effect.
delete from timer t using (
  select org_id, run_id, '!deadline' as step_key from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id) offset 0
) u
where t.org_id = any(array[u.org_id]) and t.run_id = any(array[u.run_id]) and t.step_key = any(array[u.step_key])
  and t.due_at <= clock_timestamp()
returning t.org_id, t.run_id;

-- name: sweep
-- Removes deadlines whose run is no more.
delete from timer t using (
  select org_id, run_id, '!deadline' as step_key from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id) offset 0
) u
where t.org_id = any(array[u.org_id]) and t.run_id = any(array[u.run_id]) and t.step_key = any(array[u.step_key])
  and not exists (select from item i where i.org_id = t.org_id and i.item_id = t.run_id offset 0);

-- name: tell
-- Asks locked runs to stop as overdue, unless they were asked to stop before; with the event. Blocked ones go on for that.
with i as (
  update item i set overdue = true, cancel_requested = true, blocked = null, event_no = i.event_no + 1
  from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.run_id]) and not i.cancel_requested
  returning i.org_id, i.run_id, i.event_no
)
insert into event (org_id, run_id, event_no, kind)
select org_id, run_id, event_no, 'run.overdue' from i
returning org_id, run_id;

-- name: end
-- Fails locked runs that nobody executes: live and ready rows go, the outcome and the final event are stored.
with gone as (
  delete from item i using unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.run_id])
  returning i.org_id, i.run_id, i.lane_id, i.rank, i.attempt, i.started_at, i.event_no, i.duties
),
unqueued as (
  delete from ready r using gone g
  where r.org_id = any(array[g.org_id]) and r.lane_id = any(array[g.lane_id]) and r.rank = any(array[g.rank])
    and r.item_id = any(array[g.run_id])
),
ended as (
  update run r set outcome = 'failed', error = $3::json, attempts = g.attempt, started_at = g.started_at,
                   finished_at = clock_timestamp()
  from gone g where r.org_id = any(array[g.org_id]) and r.run_id = any(array[g.run_id])
),
events as (
  insert into event (org_id, run_id, event_no, kind, data)
  select org_id, run_id, event_no + 1, 'run.failed', json_build_object('error', $3::json) from gone
)
select org_id, run_id, duties from gone;

-- name: is_overdue
-- Tells whether a run was asked to stop because of its deadline; nothing comes back when the lease is gone.
select overdue from item where org_id = $1 and item_id = $2 and token = $3;
