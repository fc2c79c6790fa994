-- Why a run does not run: read in one snapshot, by key, without any lock.

-- name: run
-- A run with its live row, if it has one.
select r.run_id, r.flow, r.version, r.queue, coalesce(r.urgency, 'standard') as urgency, r.outcome, r.error, r.finished_at, r.deadline_at, i.state, i.lane_id,
       i.rank, i.attempt, i.cancel_requested, i.overdue, i.blocked
from run r left join item i on i.org_id = r.org_id and i.item_id = r.run_id
where r.org_id = $1 and r.run_id = $2;

-- name: timer
-- When a timer of a run's own is due, and of what kind it is.
select kind, due_at, extract(epoch from due_at - clock_timestamp())::float8 as due_in_s from timer where org_id = $1 and run_id = $2 and step_key = '';

-- name: last_error
-- The error for which a run's flow code is tried again: it stands in one of its last events.
select e.data->'error' as error, e.data->'tries' as tries
from (select event_no, kind, data from event where org_id = $1 and run_id = $2 order by event_no desc limit 20) e
where e.kind = 'run.retrying' order by e.event_no desc limit 1;

-- name: ahead
-- Counts what stands before a work item in its lane, up to $5.
select count(*) from (
  select from ready r
  where r.org_id = $1 and r.lane_id = $2 and (r.rank, r.item_id) < ($3, $4)
    and r.rank >= coalesce((select l.cursor_rank from lane l where l.org_id = $1 and l.lane_id = $2 and (l.active or l.parked_on is not null)), 0)
  limit $5) c;

-- name: line
-- What stands before a work item in the fair order of its queue (function of the migrations).
select weight, virtual_s, goes_first, ahead from fair_line($1, $2, $3, $4, $5::text[], $6::float8[], $7);

-- name: pace
-- For how long of the last $2 seconds a queue had more work than slots, and how much it let go meanwhile (function of the migrations).
select full_s, went, clock_timestamp() as now_at from fullness_of(array['queue'], array[$1::text], $2);

-- name: workers
-- Live workers, with their slots in a queue, what they can do, how long that takes, and whether they can do what is asked.
select worker_id, host, pid, draining, coalesce((queues->>$1)::int, 0) as slots, coalesce((in_use->>$1)::int, 0) as in_use,
       queues->>$1 is not null as serves_queue, $2 = any(capabilities) as is_able, capabilities, told->'took_s' as took_s
from worker where expires_at > clock_timestamp() order by started_at, worker_id;

-- name: waits
-- The steps that a run waits on, with their timers, questions, child runs and work items in other queues.
select s.step_key, s.name, s.kind, s.state, s.tries, s.error, s.ref, t.due_at, extract(epoch from t.due_at - clock_timestamp())::float8 as due_in_s, q.request_id, q.role, q.title,
       q.expires_at, c.flow as child_flow, c.outcome as child_outcome, i.kind as item_kind, i.state as item_state,
       i.queue as item_queue, i.capability as item_capability, i.lane_id, i.rank,
       case when i.kind = 'step' then i.blocked end as item_blocked,
       coalesce((select r.urgency from run r where r.org_id = $1 and r.run_id = $2), 'standard') as urgency
from step s
left join timer t on t.org_id = s.org_id and t.run_id = s.run_id and t.step_key = s.step_key
left join input_request q on q.org_id = s.org_id and q.run_id = s.run_id and q.step_key = s.step_key and q.state = 'pending'
left join run c on c.org_id = s.org_id and c.run_id = s.ref
left join item i on i.org_id = s.org_id and i.item_id = s.ref
where s.org_id = $1 and s.run_id = $2 and s.state in ('waiting', 'retrying', 'unknown')
order by s.started_at, s.step_key limit 200;

-- name: holder
-- Which worker holds a work item, and since when.
select l.claimed_at, l.worker_id, w.host, w.pid
from lease l left join worker w on w.worker_id = l.worker_id
where l.org_id = $1 and l.item_id = $2;

-- name: under_way
-- Steps of this attempt that were told of as begun and not yet of as ended.
with began as materialized (
  select max(event_no) as event_no from event
  where org_id = $1 and run_id = $2 and kind in ('run.started', 'run.resumed')
)
select distinct on (e.step_key) e.step_key, e.data->>'name' as name, e.at
from event e, began b
where e.org_id = $1 and e.run_id = $2 and e.event_no > b.event_no and e.kind = 'step.started'
  and not exists (select from event x where x.org_id = $1 and x.run_id = $2 and x.event_no > e.event_no
                    and x.step_key = e.step_key and x.kind in ('step.succeeded', 'step.failed', 'step.retrying'))
order by e.step_key, e.event_no desc limit 200;

-- name: rides
-- The steps of a run that is under way that stand in line for room, beside its other branches.
select s.step_key, s.keys, s.since_us from step_lease s
join lease e on e.org_id = any(array[s.org_id]) and e.item_id = any(array[s.item_id]) and e.token = s.token
where s.org_id = $1 and s.item_id = $2 and s.since_us is not null order by s.since_us, s.step_key limit 50;
