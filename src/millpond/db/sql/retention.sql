-- Retention: what is over for long enough is deleted, a few runs at a time, by their keys.

-- name: try_lock
-- Lets one process at a time prune, and tells the time; nothing comes back where another one is at it.
select extract(epoch from clock_timestamp())::float8 as now_s where pg_try_advisory_xact_lock(7741003);

-- name: lock
-- As try_lock, but waits.
select extract(epoch from clock_timestamp())::float8 as now_s from pg_advisory_xact_lock(7741003);

-- name: due_orgs
-- Finds orgs whose pass is under way or whose last one began longer than $1 seconds ago; $2 is the end of a pass.
select o.org_id from org o left join retention r on r.org_id = o.org_id
where r.org_id is null or r.cursor_id <> $2 or r.pass_began_at < clock_timestamp() - $1 * interval '1 second'
order by o.org_id;

-- name: open_pass
-- Goes on with an org's pass or begins the next ($2 seconds after the last, from $4); nothing comes back when none is due.
insert into retention as r (org_id, cursor_id) values ($1, $4)
on conflict (org_id) do update
  set cursor_id = case when r.cursor_id = $3 then excluded.cursor_id else r.cursor_id end,
      pass_began_at = case when r.cursor_id = $3 then clock_timestamp() else r.pass_began_at end
  where r.cursor_id <> $3 or r.pass_began_at < clock_timestamp() - $2 * interval '1 second'
returning cursor_id;

-- name: advance
-- Stores how far an org's pass has come.
update retention set cursor_id = $2 where org_id = $1;

-- name: page
-- Reads the next runs after $2 and before $3, and which of them have been over for $4 seconds; not children of live runs.
select r.run_id,
       r.outcome is not null and r.finished_at < clock_timestamp() - $4 * interval '1 second'
       and (r.parent_id is null
            or not exists (select from item p where p.org_id = r.org_id and p.item_id = r.parent_id offset 0)) as is_over
from run r where r.org_id = $1 and r.run_id > $2 and r.run_id < $3
order by r.run_id limit $5;

-- name: drop_runs
-- Deletes finished runs with all that belongs to them.
with gone as (
  delete from run r using (select $1::bigint as org_id, run_id from unnest($2::uuid[]) as u(run_id) offset 0) u
  where r.org_id = any(array[u.org_id]) and r.run_id = any(array[u.run_id]) and r.outcome is not null
  returning r.org_id, r.run_id
),
steps as (delete from step s using gone g where s.org_id = any(array[g.org_id]) and s.run_id = any(array[g.run_id])),
used as (delete from run_use u using gone g where u.org_id = any(array[g.org_id]) and u.run_id = any(array[g.run_id])),
events as (delete from event e using gone g where e.org_id = any(array[g.org_id]) and e.run_id = any(array[g.run_id])),
texts as (delete from delta d using gone g where d.org_id = any(array[g.org_id]) and d.run_id = any(array[g.run_id])),
bodies as (delete from payload p using gone g where p.org_id = any(array[g.org_id]) and p.run_id = any(array[g.run_id])),
signals as (delete from signal s using gone g where s.org_id = any(array[g.org_id]) and s.run_id = any(array[g.run_id])),
questions as (
  delete from input_request q
  using (
    select g.org_id, p.request_id from gone g
    cross join lateral (select p.request_id from input_request p where p.org_id = g.org_id and p.run_id = g.run_id offset 0) p
    offset 0
  ) p
  where q.org_id = any(array[p.org_id]) and q.request_id = any(array[p.request_id])
)
select count(*) from gone;

-- name: drop_keys
-- Deletes the oldest idempotency keys of before a time, of one org or of all ($2 null).
with old as materialized (
  select org_id, subject, route, key from idempotency
  where created_at < to_timestamp($1) and ($2::bigint is null or org_id = $2) order by created_at limit $3
),
gone as (
  delete from idempotency i using old o
  where i.org_id = any(array[o.org_id]) and i.subject = any(array[o.subject]) and i.route = any(array[o.route])
    and i.key = any(array[o.key])
  returning 1
)
select count(*) from gone;

-- name: drop_inbound
-- Deletes the oldest received events of before a time, of one org or of all ($2 null).
with old as materialized (
  select org_id, event_id, received_at from inbound_event
  where received_at < to_timestamp($1) and ($2::bigint is null or org_id = $2) order by received_at limit $3
),
gone as (
  delete from inbound_event i using old o
  where i.org_id = any(array[o.org_id]) and i.event_id = any(array[o.event_id]) and i.received_at = any(array[o.received_at])
  returning 1
)
select count(*) from gone;

-- name: orgs
-- Reads the orgs, or the one with a slug.
select slug, org_id from org where $1::text is null or slug = $1 order by slug;
