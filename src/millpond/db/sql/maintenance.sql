-- name: publish_flow
-- Tells the API what can be run; the newest publication of a version holds.
insert into flow_version (flow, version, queue, permission, description, input_schema, output_schema, timeout_s,
                          deadline_s, labels, keys, urgency)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
on conflict (flow, version) do update
  set queue = excluded.queue, permission = excluded.permission, description = excluded.description,
      input_schema = excluded.input_schema, output_schema = excluded.output_schema,
      timeout_s = excluded.timeout_s, deadline_s = excluded.deadline_s, labels = excluded.labels,
      keys = excluded.keys, urgency = excluded.urgency, published_at = clock_timestamp();

-- name: register_worker
-- Opens a worker's session: its leases live as long as this row is renewed.
insert into worker (worker_id, host, pid, queues, capabilities, expires_at, release, labels)
values ($1, $2, $3, $4, $5, clock_timestamp() + $6 * interval '1 second', $7, $8);

-- name: tell_spill
-- Tells whom a worker's idle slots help, and which of its slots are kept and reserved.
update worker set spill = $2 where worker_id = $1;

-- name: beat
-- Renews a worker's leases, all at once.
update worker set expires_at = clock_timestamp() + $2 * interval '1 second', beat_at = clock_timestamp()
where worker_id = $1
returning worker_id;

-- name: drain_worker
-- Tells that a worker takes no more work.
update worker set draining = true where worker_id = $1;

-- name: remove_worker
-- Closes a worker's session.
delete from worker where worker_id = $1;

-- name: watch
-- Reads a worker's leases, and which are of work that shall stop, also of steps whose run has ended; nothing if its session is over, one row at least if not. Stores how many slots it uses ($2) and what else it tells ($3), which may be lost.
with noted as (
  update worker w set in_use = $2::json, told = $3::json where w.worker_id = $1 and $2::json is not null
  returning set_config('synchronous_commit', 'off', true)
)
select o.org_id, o.item_id, o.run_id, o.attempt, o.token, o.shall_stop
from worker w
left join lateral (
  select l.org_id, l.item_id, l.run_id, l.attempt, l.token, coalesce(i.shall_stop, false) as shall_stop
  from lease l
  left join lateral (
    select i.cancel_requested
           or i.kind = 'step' and not exists (select from item r where r.org_id = l.org_id and r.item_id = l.run_id offset 0)
           as shall_stop
    from item i where i.org_id = l.org_id and i.item_id = l.item_id limit 1
  ) i on true
  where l.worker_id = $1
) o on true
where w.worker_id = $1;

-- name: watch_known
-- The same of leases that it knows of ($2, $3): those of work that shall stop.
with noted as (
  update worker w set in_use = $4::json, told = $5::json where w.worker_id = $1 and $4::json is not null
  returning set_config('synchronous_commit', 'off', true)
)
select o.org_id, o.item_id
from worker w
left join lateral (
  select l.org_id, l.item_id
  from unnest($2::bigint[], $3::uuid[]) as u(org_id, item_id)
  join lease l on l.org_id = any(array[u.org_id]) and l.item_id = any(array[u.item_id]) and l.worker_id = $1
  cross join lateral (
    select from item i where i.org_id = l.org_id and i.item_id = l.item_id
      and (i.cancel_requested
           or i.kind = 'step' and not exists (select from item r where r.org_id = l.org_id and r.item_id = l.run_id offset 0))
    limit 1
  ) i
) o on true
where w.worker_id = $1;

-- name: take_turn
-- Lets one process at a time do the chores; tells what time it is, and for how long Postgres has been running.
select pg_try_advisory_xact_lock(7741002) as is_mine, clock_timestamp() as now,
       extract(epoch from clock_timestamp() - pg_postmaster_start_time())::float8 as uptime_s;

-- name: expired_workers
-- Removes sessions whose heartbeat has stopped; a draining one stays until what it held, or was claiming, is given back.
delete from worker where worker_id in (
  select worker_id from worker w where expires_at < clock_timestamp()
    and not (draining and (expires_at > clock_timestamp() - interval '40 seconds'
                           or exists (select from lease l where l.worker_id = w.worker_id)))
  for update skip locked)
returning worker_id, host, pid, beat_at;

-- name: orphaned
-- Locks the live rows under leases that no live session stands behind; it was silent for a lease ($2 seconds) at least.
select l.org_id, l.item_id, l.run_id, l.attempt, l.token, l.worker_id, i.kind, i.deaths,
       coalesce(w.beat_at, clock_timestamp() - $2::float8 * interval '1 second') as silent_at,
       w.worker_id is not null as was_draining
from lease l
cross join lateral (
  select i.kind, i.deaths from item i where i.org_id = l.org_id and i.item_id = l.item_id and i.token = l.token for update skip locked
) i
left join worker w on w.worker_id = l.worker_id
-- Workers are few, and put into a table of hashes once: no look for each lease.
where l.worker_id not in (select k.worker_id from worker k where not (k.draining and k.expires_at < clock_timestamp()))
limit $1;

-- name: unlease
-- Removes leases whose live rows are locked; stores what was used until their workers were last heard of, and that nobody knows of tokens.
with gone as (
  delete from lease l using unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::timestamptz[]) as u(org_id, item_id, token, until)
  where l.org_id = any(array[u.org_id]) and l.item_id = any(array[u.item_id]) and l.token = u.token
  returning l.org_id, l.item_id, l.run_id, l.attempt, l.token,
            greatest(coalesce(extract(epoch from u.until - l.claimed_at), 0), 0)::float8 as worker_s
),
lost as (
  insert into lease_use (org_id, item_id, token, keys, tokens, is_lost)
  select g.org_id, g.item_id, g.token, '{}', 0, true from gone g
  where exists (select from reservation r where r.org_id = g.org_id and r.item_id = g.item_id and r.token = g.token offset 0)
)
insert into usage_part (orgs, flows, runs, worker_s)
select array_agg(r.org_id), array_agg(r.flow), array_agg((l.attempt = 1 and l.item_id = l.run_id)::int), array_agg(l.worker_s)
from gone l cross join lateral (select r.org_id, r.flow from run r where r.org_id = l.org_id and r.run_id = l.run_id offset 0) r
having count(*) > 0;

-- name: free_claim
-- Ends sessions that wait for clients: for $2 seconds in the middle of an exchange, or under the claim's lock since $1 seconds ago.
select count(*) from (
  select pg_terminate_backend(a.pid) as is_ended from pg_stat_activity a
  where a.datname = current_database() and a.usename = current_user and a.wait_event_type = 'Client'
    and (a.state = 'active' and a.wait_event = 'ClientRead'
           and a.state_change < clock_timestamp() - $2::float8 * interval '1 second'
         or a.xact_start < clock_timestamp() - $1::float8 * interval '1 second'
           and exists (select from pg_locks l where l.pid = a.pid and l.locktype = 'advisory' and l.granted
                       and l.classid = 0 and l.objid = 7741001 and l.objsubid = 1))
) e where e.is_ended;
