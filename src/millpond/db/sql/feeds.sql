-- Feeds: events of all runs of an org, in the order of the transactions that stored them.

-- name: page
-- Looks through the next $5 events after a place, below the oldest running transaction; data comes with the wanted ones alone.
with scanned as materialized (
  select e.xid, e.run_id, e.event_no, e.kind, e.step_key, e.data, e.at
  from event e
  where e.org_id = $1 and e.xid >= $2::text::xid8 and e.xid < pg_snapshot_xmin(pg_current_snapshot())
    and (e.xid > $2::text::xid8 or (e.run_id, e.event_no) > ($3::uuid, $4::int))
  order by e.xid, e.run_id, e.event_no limit $5
)
select s.xid::text as xid, s.run_id, s.event_no, s.kind, s.step_key, s.at, r.flow, w.is_wanted,
       case when w.is_wanted then s.data end as data
from scanned s
join run r on r.org_id = $1 and r.run_id = s.run_id
cross join lateral (
  select ($6::text[] is null or s.kind = any($6)) and ($7::text is null or r.flow = $7) as is_wanted
) w
order by s.xid, s.run_id, s.event_no;

-- name: horizon
-- Tells below which transaction everything is over.
select pg_snapshot_xmin(pg_current_snapshot())::text;
