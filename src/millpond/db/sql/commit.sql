-- name: record
-- Stores steps and events of leased runs; rows come in key order, those whose lease is gone are not returned.
with held as materialized (
  select u.*, l.run_id, l.attempt, i.event_no, i.cancel_requested
  from unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
              $9::text[], $10::int[], $11::float8[], $12::text[], $13::text[])
    with ordinality as u(org_id, item_id, token, step_key, name, kind, state, output, error, tries, duration_s,
                         event_kind, event_data, ord)
  cross join lateral (
    select l.run_id, l.attempt from lease l
    where l.org_id = u.org_id and l.item_id = u.item_id and l.token = u.token for update
  ) l
  cross join lateral (
    select i.event_no, i.cancel_requested from item i
    where i.org_id = u.org_id and i.item_id = l.run_id for update
  ) i
),
numbered as materialized (
  select h.*, row_number() over (partition by org_id, run_id order by ord) as nth,
         count(*) over (partition by org_id, run_id) as many
  from held h
),
bumped as (
  update item i set event_no = n.event_no + n.many
  from numbered n where n.nth = 1 and i.org_id = n.org_id and i.item_id = n.run_id
),
steps as (
  insert into step (org_id, run_id, step_key, name, kind, state, output, error, tries, attempt, started_at, finished_at)
  select org_id, run_id, step_key, name, kind, state, output::json, error::json, tries, attempt,
         clock_timestamp() - duration_s * interval '1 second',
         case when state in ('done', 'failed') then clock_timestamp() end
  from numbered where state is not null
  on conflict (org_id, run_id, step_key) do update
    set state = excluded.state, output = excluded.output, error = excluded.error, tries = excluded.tries,
        attempt = excluded.attempt, finished_at = excluded.finished_at
    where step.state in ('waiting', 'retrying')
),
events as (
  insert into event (org_id, run_id, event_no, kind, step_key, data)
  select org_id, run_id, event_no + nth, event_kind, step_key, event_data::json from numbered
)
select ord, cancel_requested from numbered;

-- name: finish
-- Ends leased runs: the lease and live row go, the run row gets its outcome, the final event is stored.
with held as materialized (
  select u.*, l.run_id, l.attempt, i.event_no, i.started_at
  from unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[])
    with ordinality as u(org_id, item_id, token, outcome, output, error, event_data, ord)
  cross join lateral (
    select l.run_id, l.attempt from lease l
    where l.org_id = u.org_id and l.item_id = u.item_id and l.token = u.token for update
  ) l
  cross join lateral (
    select i.event_no, i.started_at from item i
    where i.org_id = u.org_id and i.item_id = l.run_id for update
  ) i
),
unleased as (
  delete from lease l using held h where l.org_id = h.org_id and l.item_id = h.item_id
),
unlived as (
  delete from item i using held h where i.org_id = h.org_id and i.item_id = h.run_id
),
ended as (
  update run r set outcome = h.outcome, output = h.output::json, error = h.error::json, attempts = h.attempt,
                   started_at = h.started_at, finished_at = clock_timestamp()
  from held h where r.org_id = h.org_id and r.run_id = h.run_id
),
events as (
  insert into event (org_id, run_id, event_no, kind, data)
  select org_id, run_id, event_no + 1, 'run.' || outcome, event_data::json from held
)
select ord from held;

-- name: own_steps
-- Finds steps that this attempt recorded already, after a commit whose outcome is unknown.
select u.ord
from unnest($1::bigint[], $2::uuid[], $3::text[], $4::int[]) with ordinality as u(org_id, run_id, step_key, attempt, ord)
join step s on s.org_id = u.org_id and s.run_id = u.run_id and s.step_key = u.step_key and s.attempt = u.attempt;

-- name: own_ends
-- Finds runs that this attempt ended already, after a commit whose outcome is unknown.
select u.ord
from unnest($1::bigint[], $2::uuid[], $3::int[]) with ordinality as u(org_id, run_id, attempt, ord)
join run r on r.org_id = u.org_id and r.run_id = u.run_id and r.attempts = u.attempt and r.outcome is not null;

-- name: lock_lease
-- Locks one lease and its run's live row; nothing comes back when the lease is gone.
select l.run_id, i.cancel_requested
from lease l
cross join lateral (select i.cancel_requested from item i
                    where i.org_id = l.org_id and i.item_id = l.run_id for update) i
where l.org_id = $1 and l.item_id = $2 and l.token = $3
for update of l;
