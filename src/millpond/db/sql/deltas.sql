-- Deltas: text of steps under way, in rows that are gone soon after the steps' records.

-- name: add
-- Stores text under leases that still hold; tells by its ordinals which those are. The live rows are locked in the order given.
with held as materialized (
  select u.ord
  from unnest($1::bigint[], $2::uuid[], $3::uuid[]) with ordinality as u(org_id, item_id, token, ord)
  cross join lateral (
    select from item i where i.org_id = u.org_id and i.item_id = u.item_id and i.token = u.token for share
  ) i
),
added as (
  insert into delta (org_id, run_id, step_key, attempt, tries, n, item_id, text)
  select d.org_id, d.run_id, d.step_key, d.attempt, d.tries, d.n, d.item_id, d.text
  from unnest($1::bigint[], $2::uuid[], $4::uuid[], $5::text[], $6::int[], $7::int[], $8::int[], $9::text[])
    with ordinality as d(org_id, item_id, run_id, step_key, attempt, tries, n, text, ord)
  where d.ord in (select ord from held)
  on conflict do nothing
)
select ord from held;

-- name: read
-- Reads text of a run's steps beyond where a reader has come to in each, and whether its try still goes on.
select d.step_key, d.attempt, d.tries, d.n, d.text, d.at,
       i.attempt is not distinct from d.attempt and (s.step_key is null or s.state = 'begun' or s.tries < d.tries) as is_live
from delta d
left join unnest($3::text[], $4::int[], $5::int[], $6::int[]) as u(step_key, attempt, tries, n) on u.step_key = d.step_key
left join item i on i.org_id = d.org_id and i.item_id = d.item_id
left join step s on s.org_id = d.org_id and s.run_id = d.run_id and s.step_key = d.step_key
where d.org_id = $1 and d.run_id = $2
  and (u.step_key is null or (d.attempt, d.tries, d.n) > (u.attempt, u.tries, u.n))
order by d.step_key, d.attempt, d.tries, d.n limit $7;

-- name: forget
-- Removes text of tries that are over, once it is older than $1 seconds; readers had time to get the last of it.
with over as materialized (
  select d.org_id, d.run_id, d.step_key, d.attempt, d.tries, d.n
  from delta d
  left join item i on i.org_id = d.org_id and i.item_id = d.item_id
  left join step s on s.org_id = d.org_id and s.run_id = d.run_id and s.step_key = d.step_key
  where d.at < clock_timestamp() - $1 * interval '1 second'
    and not (i.attempt is not distinct from d.attempt and (s.step_key is null or s.state = 'begun' or s.tries < d.tries))
  limit $2
),
gone as (
  delete from delta d using over o
  where d.org_id = o.org_id and d.run_id = o.run_id and d.step_key = o.step_key and d.attempt = o.attempt
    and d.tries = o.tries and d.n = o.n
  returning 1
)
select count(*) from gone;
