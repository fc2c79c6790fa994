-- Queues and workers as people look at them.

-- name: depths
-- Ready work of one org by queue, counted up to $2, with the time since which the oldest has been ready; a step in line is not, its run waits.
with f as materialized (select exists (select from step_need where org_id = $1) as has_steps),
named as materialized (
  select lane_id, queue, cursor_rank as first_rank from lane where org_id = $1 and (active or parked_on is not null)
  union
  select lane_id, queue, min_rank from arrival where org_id = $1
),
lanes as materialized (
  select lane_id, queue, min(first_rank) as first_rank from named group by lane_id, queue
)
select q.queue, d.depth, greatest(0, extract(epoch from clock_timestamp()) - o.rank / 1e6)::float8 as oldest_s
from (select distinct queue from lanes) q
cross join lateral (
  select count(*) as depth from (
    select from f, lanes n
    cross join lateral (select from ready r
                        where r.org_id = $1 and r.lane_id = n.lane_id and r.rank >= n.first_rank
                          and (not f.has_steps or not exists (
                            select from step_need s where s.org_id = $1 and s.need_id = r.item_id)) limit $2) r
    where n.queue = q.queue limit $2) c
) d
cross join lateral (
  select min(h.rank) as rank from f, lanes n
  cross join lateral (select r.rank from ready r where r.org_id = $1 and r.lane_id = n.lane_id and r.rank >= n.first_rank
                        and (not f.has_steps or not exists (
                          select from step_need s where s.org_id = $1 and s.need_id = r.item_id))
                      order by r.rank limit 1) h
  where n.queue = q.queue
) o;

-- name: running
-- Work items of one org that workers hold, by queue.
select queue, count(*) as items from lease where org_id = $1 group by queue;

-- name: resting
-- Live work items of one org that are neither in a line nor held, by queue and state; looks at the first $2 live rows.
with seen as materialized (
  select i.item_id, i.run_id, i.state, i.queue from item i where i.org_id = $1 limit $2
)
select coalesce(s.queue, r.queue) as queue, s.state, count(*) as items, (select count(*) from seen) as looked_at
from seen s left join run r on r.org_id = $1 and r.run_id = s.run_id and s.state not in ('queued', 'running')
group by 1, 2;

-- name: workers
-- Every worker with a live heartbeat, oldest first.
select worker_id, host, pid, release, queues, labels, in_use, spill, capabilities, started_at, draining as is_draining,
       greatest(0, extract(epoch from clock_timestamp() - beat_at))::float8 as heartbeat_age_s
from worker where expires_at > clock_timestamp() order by started_at, worker_id;
