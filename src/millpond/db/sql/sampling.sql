-- How full limits and queues are, looked at once a second by one process at a time.

-- name: turn
-- Takes the turn to look, if nobody looked in the last moment; tells how long ago that was (2 s at most), and what was seen then.
with o as materialized (
  select s.at, s.seen from sampling s for update skip locked
),
n as (
  insert into sampling (at) select clock_timestamp() where not exists (select from sampling) on conflict (is_one) do nothing
)
update sampling s set at = clock_timestamp() from o where o.at <= clock_timestamp() - interval '0.9 seconds'
returning least(2, extract(epoch from s.at - o.at))::float8 as passed_s, o.seen, to_timestamp(20 * floor(extract(epoch from s.at) / 20)) as bucket_at,
          (extract(epoch from s.at) * 1000000)::bigint as now_us,
          coalesce((select v.version from limit_version v), 0) as version, exists (select from room) as has_rooms;

-- name: queues
-- Slots of live workers by queue, how many are in use, what each worker has let go so far, and whether work waits that they could do.
with w as materialized (
  select worker_id, queues, in_use, told, capabilities from worker where expires_at > clock_timestamp() and not draining
),
a as materialized (
  select array_agg(distinct u.able) as able from w, unnest(w.capabilities) as u(able)
),
q as materialized (
  select s.queue, sum(s.slots::int)::int as slots, coalesce(sum((w.in_use->>s.queue)::int), 0)::int as in_use,
         json_object_agg(w.worker_id, coalesce((w.told->'went'->>s.queue)::bigint, 0)) as went
  from w, json_each_text(w.queues) as s(queue, slots) group by s.queue
)
select q.queue, q.slots, q.in_use, q.went,
       not exists (select from queue_pause z where z.queue = q.queue) and exists (
         select from (select s.org_id from share s where s.queue = q.queue and s.active order by s.virtual_s, s.org_id limit 1000) s
         cross join lateral (
           select from lane l
           where l.org_id = s.org_id and l.queue = q.queue and l.active and l.capability = any(a.able)
             and exists (select from ready r where r.org_id = l.org_id and r.lane_id = l.lane_id and r.rank >= l.cursor_rank offset 0)
             and not exists (select from pause z where z.org_id = l.org_id and z.queue in ('', l.queue)
                             and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')) offset 0)
           limit 1) l) as waits
from q, a;

-- name: held
-- Leases by lane, and tries of their steps (a step's keys after an empty one), with what they count on.
select h.org_id, h.lane_id, l.queue, l.capability, l.keys, h.n
from (select e.org_id, e.lane_id, count(*) as n from lease e group by e.org_id, e.lane_id) h
join lane l on l.org_id = any(array[h.org_id]) and l.lane_id = any(array[h.lane_id])
union all
select h.org_id, h.lane_id, l.queue, l.capability, l.keys || array[''] || h.keys, h.n
from (select e.org_id, e.lane_id, s.keys, count(*) as n
      from step_lease s join lease e on e.org_id = any(array[s.org_id]) and e.item_id = any(array[s.item_id])
        and e.token = s.token
      where s.since_us is null group by e.org_id, e.lane_id, s.keys) h
join lane l on l.org_id = any(array[h.org_id]) and l.lane_id = any(array[h.lane_id]);

-- name: spent
-- Rates whose meters are ahead of the time.
select room, tat_us, pace from meter where tat_us > $1 limit $2;

-- name: rooms
-- Rooms under which lanes stand, or stood when a claim last looked.
select distinct room from room limit $1;

-- name: parked_orgs
-- Orgs of which work stands under a full room; looks at the first $1 lanes.
select distinct p.org_id from (select l.org_id from lane l where l.parked_on is not null and not l.active limit $1) p;

-- name: fold
-- Adds what was seen to its 20 s, and forgets what is older than an hour.
with gone as (
  delete from fullness where at < $1::timestamptz - interval '62 minutes'
)
insert into fullness as f (kind, name, at, full_s, waited_s, went)
select u.kind, u.name, $1::timestamptz, u.full_s, u.waited_s, u.went
from unnest($2::text[], $3::text[], $4::float8[], $5::float8[], $6::bigint[]) as u(kind, name, full_s, waited_s, went)
on conflict (kind, name, at) do update
  set full_s = f.full_s + excluded.full_s, waited_s = f.waited_s + excluded.waited_s, went = f.went + excluded.went;

-- name: remember
-- Keeps what was seen for whoever looks next.
update sampling set seen = $1;
