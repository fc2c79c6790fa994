-- What the end of a run sees to, in the transaction of that end.

-- name: drop_waits
-- Removes what ended runs still waited for.
with u as materialized (select * from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)),
timers as (
  delete from timer t using u where t.org_id = u.org_id and t.run_id = u.run_id
)
update input_request q set state = 'cancelled', resolved_at = clock_timestamp()
from u where q.org_id = u.org_id and q.run_id = u.run_id and q.state = 'pending';

-- name: free_keys
-- Gives back the live keys of ended runs.
delete from live_key k using unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
where k.org_id = u.org_id and k.run_id = u.run_id;
