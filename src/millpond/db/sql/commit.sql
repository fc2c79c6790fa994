-- name: record
-- Stores steps and events, at most one of each run, where the lease still holds; only those are returned. Columns are joined.
with held as (
  update item i set event_no = i.event_no + 1
  from unnest(string_to_array($1, chr(30))::bigint[], string_to_array($2, chr(30))::uuid[], string_to_array($3, chr(30))::uuid[],
              string_to_array($4, chr(30)), string_to_array($5, chr(30)), string_to_array($6, chr(30)),
              string_to_array($7, chr(30), ''), string_to_array($8, chr(30), ''), string_to_array($9, chr(30), ''),
              string_to_array($10, chr(30))::int[], string_to_array($11, chr(30))::float8[], string_to_array($12, chr(30)),
              string_to_array($13, chr(30)), string_to_array($14, chr(30), '')::int[],
              string_to_array($15, chr(30))::bool[])
    with ordinality as u(org_id, item_id, token, step_key, name, kind, state, output, error, tries, duration_s,
                         event_kind, event_data, seq, is_new, ord)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id]) and i.token = u.token
  returning i.org_id, i.run_id, i.attempt, i.event_no, i.cancel_requested, u.step_key, u.name, u.kind, u.state, u.output,
            u.error, u.tries, u.duration_s, u.event_kind, u.event_data, u.seq, u.is_new, u.ord
),
-- Where no record of the key can stand, it need not be looked for: that is most of what an upsert costs.
fresh as (
  insert into step (org_id, run_id, step_key, name, kind, state, output, error, tries, attempt, started_at, finished_at, seq)
  select org_id, run_id, step_key, name, kind, state, output::json, error::json, tries, attempt,
         clock_timestamp() - duration_s * interval '1 second', clock_timestamp(), seq
  from held where is_new
),
steps as (
  insert into step (org_id, run_id, step_key, name, kind, state, output, error, tries, attempt, started_at, finished_at,
                    seq, effect)
  select org_id, run_id, step_key, name, kind, state, output::json, error::json, tries, attempt,
         clock_timestamp() - duration_s * interval '1 second',
         case when state in ('done', 'failed') then clock_timestamp() end, seq,
         case when state = 'begun' then 'once' end
  from held where state is not null and not is_new
  on conflict (org_id, run_id, step_key) do update
    set state = excluded.state, output = excluded.output, error = excluded.error, tries = excluded.tries,
        attempt = excluded.attempt, finished_at = excluded.finished_at
    where step.state in ('waiting', 'retrying', 'begun')
),
events as (
  insert into event (org_id, run_id, event_no, kind, step_key, data)
  select org_id, run_id, event_no, event_kind, step_key, event_data::json from held
)
select ord, cancel_requested from held;

-- name: record_done
-- Stores results of first tries, as record does: of such writes alone a batch mostly is, and each is known by less.
with held as (
  update item i set event_no = i.event_no + 1
  from unnest(string_to_array($1, chr(30))::bigint[], string_to_array($2, chr(30))::uuid[], string_to_array($3, chr(30))::uuid[],
              string_to_array($4, chr(30)), string_to_array($5, chr(30)), string_to_array($6, chr(30), ''),
              string_to_array($7, chr(30))::float8[], string_to_array($8, chr(30)), string_to_array($9, chr(30), '')::int[])
    with ordinality as u(org_id, item_id, token, step_key, name, output, duration_s, event_data, seq, ord)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id]) and i.token = u.token
  returning i.org_id, i.run_id, i.attempt, i.event_no, i.cancel_requested, u.step_key, u.name, u.output, u.duration_s,
            u.event_data, u.seq, u.ord
),
steps as (
  insert into step (org_id, run_id, step_key, name, kind, state, output, tries, attempt, started_at, finished_at, seq)
  select org_id, run_id, step_key, name, 'step', 'done', output::json, 1, attempt,
         clock_timestamp() - duration_s * interval '1 second', clock_timestamp(), seq
  from held
),
events as (
  insert into event (org_id, run_id, event_no, kind, step_key, data)
  select org_id, run_id, event_no, 'step.succeeded', step_key, event_data::json from held
)
select ord, cancel_requested from held;

-- name: record_done_together
-- Stores results of first tries as record_done does, where runs have several of them: each run's are numbered in order.
with u as materialized (
  select u.org_id, u.item_id, u.token, count(*)::int as many, array_agg(u.step_key) as keys, array_agg(u.name) as names,
         array_agg(u.output) as outputs, array_agg(u.duration_s) as durations, array_agg(u.event_data) as data,
         array_agg(u.seq) as seqs, array_agg(u.ord) as ords
  from (
    select * from unnest(string_to_array($1, chr(30))::bigint[], string_to_array($2, chr(30))::uuid[],
                         string_to_array($3, chr(30))::uuid[], string_to_array($4, chr(30)), string_to_array($5, chr(30)),
                         string_to_array($6, chr(30), ''), string_to_array($7, chr(30))::float8[],
                         string_to_array($8, chr(30)), string_to_array($9, chr(30), '')::int[])
      with ordinality as u(org_id, item_id, token, step_key, name, output, duration_s, event_data, seq, ord)
    order by item_id, token, org_id, ord
  ) u
  -- Rows are locked in the order of ids, as by every group commit.
  group by u.item_id, u.token, u.org_id order by u.item_id
),
held as (
  update item i set event_no = i.event_no + u.many from u
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id]) and i.token = u.token
  returning i.org_id, i.run_id, i.attempt, i.event_no - u.many as base, i.cancel_requested, u.keys, u.names, u.outputs,
            u.durations, u.data, u.seqs, u.ords
),
each as materialized (
  select h.org_id, h.run_id, h.attempt, h.cancel_requested, h.base + e.nth as event_no, e.*
  from held h cross join lateral unnest(h.keys, h.names, h.outputs, h.durations, h.data, h.seqs, h.ords)
    with ordinality as e(step_key, name, output, duration_s, event_data, seq, ord, nth)
),
steps as (
  insert into step (org_id, run_id, step_key, name, kind, state, output, tries, attempt, started_at, finished_at, seq)
  select org_id, run_id, step_key, name, 'step', 'done', output::json, 1, attempt,
         clock_timestamp() - duration_s * interval '1 second', clock_timestamp(), seq
  from each
),
events as (
  insert into event (org_id, run_id, event_no, kind, step_key, data)
  select org_id, run_id, event_no, 'step.succeeded', step_key, event_data::json from each
)
select ord, cancel_requested from each;

-- name: finish
-- Ends runs without duties whose lease still holds: live row and lease go; outcome, final event and what it used are stored.
with held as (
  delete from item i
  using unnest(string_to_array($1, chr(30))::bigint[], string_to_array($2, chr(30))::uuid[], string_to_array($3, chr(30))::uuid[],
               string_to_array($4, chr(30)), string_to_array($5, chr(30), ''), string_to_array($6, chr(30), ''),
               string_to_array($7, chr(30)))
    with ordinality as u(org_id, item_id, token, outcome, output, error, event_data, ord)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id]) and i.token = u.token and i.duties = 0
  returning i.org_id, i.item_id, i.run_id, i.attempt, i.event_no, i.started_at, u.outcome, u.output, u.error, u.event_data,
            u.ord
),
unleased as (
  delete from lease l using held h where l.org_id = any(array[h.org_id]) and l.item_id = any(array[h.item_id])
  returning h.org_id, h.run_id, h.attempt, h.started_at, h.outcome, h.output, h.error,
            date_part('epoch', clock_timestamp() - l.claimed_at) as worker_s
),
ended as (
  update run r set outcome = h.outcome, output = h.output::json, error = h.error::json, attempts = h.attempt,
                   started_at = h.started_at, finished_at = clock_timestamp(), tells_use = true
  from unleased h where r.org_id = any(array[h.org_id]) and r.run_id = any(array[h.run_id])
  returning r.org_id, r.flow, h.attempt, h.worker_s
),
metered as (
  insert into usage_part (orgs, flows, runs, worker_s)
  select array_agg(org_id), array_agg(flow), array_agg(runs), array_agg(worker_s)
  from (select org_id, flow, (count(*) filter (where attempt = 1))::int as runs, sum(worker_s) as worker_s
        from ended group by org_id, flow) u
  having count(*) > 0
),
events as (
  insert into event (org_id, run_id, event_no, kind, data)
  select org_id, run_id, event_no + 1, 'run.' || outcome, event_data::json from held
)
select ord from held;

-- name: finish_with_last
-- As finish, of runs whose last steps' results are stored with their ends: what record_done stores of each, where there is one.
with held as (
  delete from item i
  using unnest(string_to_array($1, chr(30))::bigint[], string_to_array($2, chr(30))::uuid[], string_to_array($3, chr(30))::uuid[],
               string_to_array($4, chr(30)), string_to_array($5, chr(30), ''), string_to_array($6, chr(30), ''),
               string_to_array($7, chr(30)), string_to_array($8, chr(30), ''), string_to_array($9, chr(30), ''),
               string_to_array($10, chr(30), ''), string_to_array($11, chr(30), '')::float8[],
               string_to_array($12, chr(30), ''), string_to_array($13, chr(30), '')::int[])
    with ordinality as u(org_id, item_id, token, outcome, output, error, event_data, step_key, step_name, step_output,
                         duration_s, step_data, seq, ord)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id]) and i.token = u.token and i.duties = 0
  returning i.org_id, i.item_id, i.run_id, i.attempt, i.event_no, i.started_at, u.outcome, u.output, u.error, u.event_data,
            u.step_key, u.step_name, u.step_output, u.duration_s, u.step_data, u.seq, u.ord
),
unleased as (
  delete from lease l using held h where l.org_id = any(array[h.org_id]) and l.item_id = any(array[h.item_id])
  returning h.org_id, h.run_id, h.attempt, h.started_at, h.outcome, h.output, h.error,
            date_part('epoch', clock_timestamp() - l.claimed_at) as worker_s
),
ended as (
  update run r set outcome = h.outcome, output = h.output::json, error = h.error::json, attempts = h.attempt,
                   started_at = h.started_at, finished_at = clock_timestamp(), tells_use = true
  from unleased h where r.org_id = any(array[h.org_id]) and r.run_id = any(array[h.run_id])
  returning r.org_id, r.flow, h.attempt, h.worker_s
),
metered as (
  insert into usage_part (orgs, flows, runs, worker_s)
  select array_agg(org_id), array_agg(flow), array_agg(runs), array_agg(worker_s)
  from (select org_id, flow, (count(*) filter (where attempt = 1))::int as runs, sum(worker_s) as worker_s
        from ended group by org_id, flow) u
  having count(*) > 0
),
steps as (
  insert into step (org_id, run_id, step_key, name, kind, state, output, tries, attempt, started_at, finished_at, seq)
  select org_id, run_id, step_key, step_name, 'step', 'done', step_output::json, 1, attempt,
         clock_timestamp() - duration_s * interval '1 second', clock_timestamp(), seq
  from held where step_key is not null
),
events as (
  insert into event (org_id, run_id, event_no, kind, step_key, data)
  select org_id, run_id, event_no + 1, 'step.succeeded', step_key, step_data::json from held where step_key is not null
  union all
  select org_id, run_id, event_no + 1 + (step_key is not null)::int, 'run.' || outcome, null, event_data::json from held
)
select ord from held;

-- name: finish_with_duties
-- As finish, of runs with whatever duties; tells which they have.
with held as (
  delete from item i
  using unnest(string_to_array($1, chr(30))::bigint[], string_to_array($2, chr(30))::uuid[], string_to_array($3, chr(30))::uuid[],
               string_to_array($4, chr(30)), string_to_array($5, chr(30), ''), string_to_array($6, chr(30), ''),
               string_to_array($7, chr(30)))
    with ordinality as u(org_id, item_id, token, outcome, output, error, event_data, ord)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id]) and i.token = u.token
  returning i.org_id, i.item_id, i.run_id, i.attempt, i.event_no, i.started_at, u.outcome, u.output, u.error, u.event_data,
            u.ord, i.duties
),
unleased as (
  delete from lease l using held h where l.org_id = any(array[h.org_id]) and l.item_id = any(array[h.item_id])
  returning h.org_id, h.run_id, h.attempt, h.started_at, h.outcome, h.output, h.error,
            date_part('epoch', clock_timestamp() - l.claimed_at) as worker_s
),
ended as (
  update run r set outcome = h.outcome, output = h.output::json, error = h.error::json, attempts = h.attempt,
                   started_at = h.started_at, finished_at = clock_timestamp(), tells_use = true
  from unleased h where r.org_id = any(array[h.org_id]) and r.run_id = any(array[h.run_id])
  returning r.org_id, r.flow, h.attempt, h.worker_s
),
metered as (
  insert into usage_part (orgs, flows, runs, worker_s)
  select array_agg(org_id), array_agg(flow), array_agg(runs), array_agg(worker_s)
  from (select org_id, flow, (count(*) filter (where attempt = 1))::int as runs, sum(worker_s) as worker_s
        from ended group by org_id, flow) u
  having count(*) > 0
),
events as (
  insert into event (org_id, run_id, event_no, kind, data)
  select org_id, run_id, event_no + 1, 'run.' || outcome, event_data::json from held
)
select ord, org_id, run_id, duties, outcome from held;

-- name: own_steps
-- Finds steps that this attempt recorded already, after a commit whose outcome is unknown.
select u.ord
from unnest($1::bigint[], $2::uuid[], $3::text[], $4::int[], $5::int[], $6::text[])
  with ordinality as u(org_id, run_id, step_key, attempt, tries, state, ord)
join step s on s.org_id = u.org_id and s.run_id = u.run_id and s.step_key = u.step_key and s.attempt = u.attempt
  and s.tries = u.tries and s.state = u.state;

-- name: own_ends
-- Finds runs that this attempt ended already, after a commit whose outcome is unknown.
select u.ord
from unnest($1::bigint[], $2::uuid[], $3::int[]) with ordinality as u(org_id, run_id, attempt, ord)
join run r on r.org_id = u.org_id and r.run_id = u.run_id and r.attempts = u.attempt and r.outcome is not null;

-- name: lock_live
-- Locks live rows in the order given.
select 1 from unnest($1::bigint[], $2::uuid[]) as u(org_id, item_id)
cross join lateral (select from item i where i.org_id = u.org_id and i.item_id = u.item_id for update) i;

-- name: hold
-- Locks the live row of a run under this lease; nothing comes back when the lease is gone.
select cancel_requested from item where org_id = $1 and item_id = $2 and token = $3 for update;

-- name: hold_free
-- Locks live rows of runs under their leases, in the order given, and waits for none; those whose lease is gone do not come back, those that others hold have no answer.
select u.nth, i.cancel_requested
from unnest($1::int[], $2::bigint[], $3::uuid[], $4::uuid[]) as u(nth, org_id, item_id, token)
left join lateral (
  select i.cancel_requested from item i where i.org_id = u.org_id and i.item_id = u.item_id and i.token = u.token
  for update skip locked
) i on true
where i.cancel_requested is not null
  or exists (select from item i where i.org_id = u.org_id and i.item_id = u.item_id and i.token = u.token offset 0);
