-- What happens to runs under which workers died.

-- name: fail_poisoned
-- Ends runs under which the process died that had them alone; their live rows are locked.
with held as (
  delete from item i using unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[], $5::timestamptz[])
    as u(org_id, item_id, token, error, until)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id]) and i.token = u.token
  returning i.org_id, i.item_id, i.run_id, i.attempt, i.event_no, i.started_at, i.duties, u.error, u.until
),
unleased as (
  delete from lease l using held h where l.org_id = any(array[h.org_id]) and l.item_id = any(array[h.item_id])
  returning l.org_id, l.item_id, l.run_id, l.attempt, l.token,
            greatest(coalesce(extract(epoch from h.until - l.claimed_at), 0), 0)::float8 as worker_s
),
lost as (
  insert into lease_use (org_id, item_id, token, keys, tokens, is_lost)
  select g.org_id, g.item_id, g.token, '{}', 0, true from unleased g
  where exists (select from reservation r where r.org_id = g.org_id and r.item_id = g.item_id and r.token = g.token offset 0)
),
metered as (
  insert into usage_part (orgs, flows, runs, worker_s)
  select array_agg(r.org_id), array_agg(r.flow), array_agg((l.attempt = 1 and l.item_id = l.run_id)::int), array_agg(l.worker_s)
  from unleased l cross join lateral (select r.org_id, r.flow from run r where r.org_id = l.org_id and r.run_id = l.run_id offset 0) r
  having count(*) > 0
),
ended as (
  update run r set outcome = 'failed', error = h.error::json, attempts = h.attempt, started_at = h.started_at,
                   finished_at = clock_timestamp()
  from held h where r.org_id = any(array[h.org_id]) and r.run_id = any(array[h.run_id])
),
events as (
  insert into event (org_id, run_id, event_no, kind, data)
  select org_id, run_id, event_no + 1, 'run.failed', json_build_object('error', error::json) from held
)
select org_id, run_id, duties from held;
