-- Recorded histories, to be compared with code.

-- name: runs_to_check
-- Begun runs of the given flow versions in every org: unfinished ones first, then ended ones, newest first of each.
with wanted as materialized (select * from unnest($1::text[], $2::int[]) as w(flow, version)),
live as (
  select r.org_id, r.run_id, r.flow, r.version, r.queue, r.input, r.subject, i.state, true as is_live, r.error
  from item i
  join run r on r.org_id = i.org_id and r.run_id = i.run_id
  join wanted w on w.flow = r.flow and w.version = r.version
  where i.kind = 'run' and i.attempt > 0
  order by r.run_id desc limit $3
),
ended as (
  select r.org_id, r.run_id, r.flow, r.version, r.queue, r.input, r.subject, r.outcome, false, r.error
  from org o cross join wanted w
  cross join lateral (
    select * from run r
    where r.org_id = o.org_id and r.flow = w.flow and r.version = w.version and r.outcome is not null and r.attempts > 0
    order by r.run_id desc limit $3
  ) r
  order by r.run_id desc limit $3
)
select c.org_id, c.run_id, c.flow, c.version, c.queue, coalesce(c.input, p.body) as input, c.subject, c.state, c.error
from (select * from live union all select * from ended) c
left join payload p on p.org_id = c.org_id and p.run_id = c.run_id and p.slot = 'input'
order by c.is_live desc, c.run_id desc limit $3;
