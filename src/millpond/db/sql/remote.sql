-- Steps that execute in another queue than their run. Their live rows are locked before those of their runs.

-- name: hold_run
-- Locks the live row of a run under this lease, and tells what its steps inherit; one that repeats poison is careful with them.
select r.keys, r.priority, coalesce(r.urgency, 'standard') as urgency,
       i.lane_id & 2 = 2 and r.rerun_of is not null and exists (
         select from run p where p.org_id = r.org_id and p.run_id = r.rerun_of and p.outcome = 'failed'
           and case when strpos(p.error::text, '\u0000') = 0 then p.error->>'code' end = 'poison' offset 0) as is_careful
from item i join run r on r.org_id = any(array[i.org_id]) and r.run_id = any(array[i.run_id])
where i.org_id = $1 and i.item_id = $2 and i.token = $3 for update of i;

-- name: send
-- Records a step as waiting and queues its work item, with the event of the locked run; a step that waits or is over is left.
with t as materialized (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as us),
s as (
  insert into step (org_id, run_id, step_key, name, kind, state, input, ref, tries, attempt, started_at, seq)
  values ($1, $2, $4, $5, 'step', 'waiting', $6, $3, 0, $7, clock_timestamp(), $15)
  on conflict (org_id, run_id, step_key) do update
    set state = excluded.state, input = excluded.input, ref = excluded.ref where step.state = 'retrying'
  returning step_key, tries
),
i as (
  insert into item (org_id, item_id, run_id, state, kind, lane_id, rank, tries, step_key, queue, capability, deaths, keys)
  select $1, $3, $2, 'queued', 'step', $10, t.us, s.tries, s.step_key, $8, $9, $16::smallint, $18::text[] from s, t
),
q as (
  insert into ready (org_id, lane_id, rank, item_id) select $1, $10, t.us, $3 from s, t
),
a as (
  insert into arrival (org_id, lane_id, queue, capability, keys, offset_us, min_rank)
  select $1, $10, $8, $9 || $17, $11, $12, t.us from s, t
),
n as (
  update item set event_no = event_no + 1, duties = duties | $14::smallint
  from s where item.org_id = $1 and item.item_id = $2
  returning event_no
)
insert into event (org_id, run_id, event_no, kind, step_key, data)
select $1, $2, n.event_no, 'step.queued', $4, $13 from n
returning event_no;

-- name: orders
-- Reads what is to be done under leases of steps; nothing comes back of one whose run has ended.
select i.org_id, i.item_id, s.name, coalesce(s.input, p.body) as input, r.duties,
       extract(epoch from clock_timestamp() - i.started_at)::float8 as age_s
from unnest($1::bigint[], $2::uuid[]) as u(org_id, item_id)
join item i on i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id])
join item r on r.org_id = any(array[i.org_id]) and r.item_id = any(array[i.run_id])
join step s on s.org_id = any(array[i.org_id]) and s.run_id = any(array[i.run_id])
  and s.step_key = any(array[i.step_key]) and s.state = 'waiting'
left join payload p on s.input is null and p.org_id = any(array[s.org_id]) and p.run_id = any(array[s.run_id])
  and p.slot = any(array['args:' || s.step_key]);

-- name: hold
-- Locks the live rows of steps under these leases, in the order given.
select u.ord from unnest($1::bigint[], $2::uuid[], $3::uuid[]) with ordinality as u(org_id, item_id, token, ord)
cross join lateral (
  select from item i where i.org_id = u.org_id and i.item_id = u.item_id and i.token = u.token for update
) i;

-- name: lock_runs
-- Locks the live rows of runs, in the order given, after those of their steps.
select u.org_id, u.run_id, i.state from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
cross join lateral (select i.state from item i where i.org_id = u.org_id and i.item_id = u.run_id for update) i;

-- name: lock_free_runs
-- As lock_runs, without those that somebody holds.
select u.org_id, u.run_id from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
cross join lateral (
  select from item i where i.org_id = u.org_id and i.item_id = u.run_id for update skip locked
) i;

-- name: live_runs
-- Tells which runs have not ended.
select u.org_id, u.run_id from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
cross join lateral (select from item i where i.org_id = u.org_id and i.item_id = u.run_id offset 0) i;

-- name: places
-- Reads which steps work items are, in which queue, and how often they were tried.
select i.org_id, i.item_id, i.step_key, i.queue, i.tries, s.name
from unnest($1::bigint[], $2::uuid[]) as u(org_id, item_id)
join item i on i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id])
join step s on s.org_id = any(array[i.org_id]) and s.run_id = any(array[i.run_id]) and s.step_key = any(array[i.step_key]);

-- name: settle
-- Stores outcomes, tries and events of steps whose live rows and runs are locked: ended ones leave no work item.
with u as materialized (
  select * from unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::int[],
                       $9::text[], $10::text[], $11::int[])
    with ordinality as u(org_id, item_id, run_id, step_key, state, output, error, tries, event_kind, event_data, attempt,
                         ord)
),
steps as (
  update step s set state = u.state, output = u.output::json, error = u.error::json, tries = u.tries,
                    attempt = u.attempt, finished_at = case when u.state <> 'waiting' then clock_timestamp() end
  from u where u.state is not null
    and s.org_id = any(array[u.org_id]) and s.run_id = any(array[u.run_id]) and s.step_key = any(array[u.step_key])
      and s.state = 'waiting'
),
tried as (
  update item i set tries = u.tries from u
  where u.state = 'waiting' and i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id])
),
ended as (
  delete from item i using u where u.state in ('done', 'failed') and i.org_id = any(array[u.org_id])
    and i.item_id = any(array[u.item_id])
),
unleased as (
  delete from lease l using u where u.state in ('done', 'failed') and l.org_id = any(array[u.org_id])
    and l.item_id = any(array[u.item_id])
  returning l.org_id, l.item_id, l.run_id, l.attempt, extract(epoch from clock_timestamp() - l.claimed_at)::float8 as worker_s
),
metered as (
  insert into usage_part (orgs, flows, runs, worker_s)
  select array_agg(r.org_id), array_agg(r.flow), array_agg((l.attempt = 1 and l.item_id = l.run_id)::int), array_agg(l.worker_s)
  from unleased l cross join lateral (select r.org_id, r.flow from run r where r.org_id = l.org_id and r.run_id = l.run_id offset 0) r
  having count(*) > 0
),
c as materialized (
  select u.*, row_number() over (partition by org_id, run_id order by ord) as nth,
         count(*) over (partition by org_id, run_id) as many from u
),
n as (
  update item i set event_no = i.event_no + c.many from c
  where c.nth = 1 and i.org_id = any(array[c.org_id]) and i.item_id = any(array[c.run_id])
  returning i.org_id, i.item_id, i.event_no - c.many as base
)
insert into event (org_id, run_id, event_no, kind, step_key, data)
select c.org_id, c.run_id, n.base + c.nth, c.event_kind, c.step_key, c.event_data::json
from c join n on n.org_id = c.org_id and n.item_id = c.run_id;

-- name: rest
-- Lets a locked step wait for its next try, without a lease; what was used is stored, what came so far alone is no suspect.
with gone as (
  delete from lease l where l.org_id = $1 and l.item_id = $2
  returning l.org_id, l.item_id, l.run_id, l.attempt, extract(epoch from clock_timestamp() - l.claimed_at)::float8 as worker_s
),
metered as (
  insert into usage_part (orgs, flows, runs, worker_s)
  select array_agg(r.org_id), array_agg(r.flow), array_agg((l.attempt = 1 and l.item_id = l.run_id)::int), array_agg(l.worker_s)
  from gone l cross join lateral (select r.org_id, r.flow from run r where r.org_id = l.org_id and r.run_id = l.run_id offset 0) r
  having count(*) > 0
)
update item set state = 'waiting', token = null, deaths = case when lane_id & 2 = 2 then 0 else deaths end,
                lane_id = lane_id & ~2::bigint
where org_id = $1 and item_id = $2;

-- name: tell_lost
-- Notes of leases whose workers are gone that nobody knows what tokens they used: what they had reserved stays used.
insert into lease_use (org_id, item_id, token, keys, tokens, is_lost)
select u.org_id, u.item_id, u.token, '{}', 0, true from unnest($1::bigint[], $2::uuid[], $3::uuid[]) as u(org_id, item_id, token)
where exists (select from reservation r where r.org_id = u.org_id and r.item_id = u.item_id and r.token = u.token offset 0);

-- name: drop
-- Removes steps under leases, whose runs have ended or end.
with i as (
  delete from item i using unnest($1::bigint[], $2::uuid[], $3::uuid[]) as u(org_id, item_id, token)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id]) and i.token = u.token
  returning i.org_id, i.item_id
),
gone as (
  delete from lease l using i where l.org_id = any(array[i.org_id]) and l.item_id = any(array[i.item_id])
  returning l.org_id, l.item_id, l.run_id, l.attempt, extract(epoch from clock_timestamp() - l.claimed_at)::float8 as worker_s
)
insert into usage_part (orgs, flows, runs, worker_s)
select array_agg(r.org_id), array_agg(r.flow), array_agg((l.attempt = 1 and l.item_id = l.run_id)::int), array_agg(l.worker_s)
from gone l cross join lateral (select r.org_id, r.flow from run r where r.org_id = l.org_id and r.run_id = l.run_id offset 0) r
having count(*) > 0;

-- name: stop
-- Removes steps of ended runs that nobody executes, asks for the stop of others; a locked one is left: its holder finds out.
with mine as materialized (
  select i.org_id, i.item_id, i.state, i.lane_id, i.rank
  from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
  cross join lateral (
    select i.org_id, i.item_id, i.state, i.lane_id, i.rank from item i
    where i.org_id = u.org_id and i.run_id = u.run_id and i.kind = 'step'
    for update skip locked
  ) i
),
asked as (
  update item i set cancel_requested = true from mine m
  where m.state = 'running' and i.org_id = any(array[m.org_id]) and i.item_id = any(array[m.item_id])
),
gone as (
  delete from item i using mine m where m.state <> 'running' and i.org_id = any(array[m.org_id])
    and i.item_id = any(array[m.item_id])
),
unqueued as (
  delete from ready r using mine m
  where r.org_id = any(array[m.org_id]) and r.lane_id = any(array[m.lane_id]) and r.rank = any(array[m.rank])
    and r.item_id = any(array[m.item_id])
)
delete from timer t using mine m where t.org_id = any(array[m.org_id]) and t.run_id = any(array[m.item_id]);
