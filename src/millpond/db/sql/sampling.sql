-- How full limits and queues are, looked at once a second by one process at a time.

-- name: look
-- Looks, if nobody did in the last moment; tells when the look before was and what it saw, how long ago (2 s at most), and of queues: slots of live workers, how many are in use, what each worker has let go so far, and whether work waits that they could do.
with n as (
  insert into sampling (at) select clock_timestamp() where not exists (select from sampling) on conflict (is_one) do nothing
),
o as materialized (
  select s.at, s.seen, t.now from sampling s, (select clock_timestamp() as now) t
  where s.at <= t.now - interval '0.9 seconds'
),
w as materialized (
  select w.worker_id, w.queues, w.in_use, w.told, w.capabilities from o cross join worker w
  where w.expires_at > o.now and not w.draining
),
a as materialized (
  select array_agg(distinct u.able) as able from w, unnest(w.capabilities) as u(able)
),
q as materialized (
  select s.queue, sum(s.slots::int)::int as slots, coalesce(sum((w.in_use->>s.queue)::int), 0)::int as in_use,
         json_object_agg(w.worker_id, coalesce((w.told->'went'->>s.queue)::bigint, 0)) as went
  from w, json_each_text(w.queues) as s(queue, slots) group by s.queue
),
found as (
  select q.queue, q.slots, q.in_use, q.went,
         not exists (select from queue_pause z where z.queue = q.queue) and exists (
           select from (select s.org_id from share s where s.queue = q.queue and s.active
                   and s.virtual_s >= coalesce((select k.least_s from fair_clock k where k.queue = q.queue order by k.virtual_s desc limit 1),
                                               '-infinity')
                 order by s.virtual_s, s.org_id limit 1000) s
           cross join lateral (
             select from lane l
             where l.org_id = s.org_id and l.queue = q.queue and l.active and l.capability = any(a.able)
               and exists (select from ready r where r.org_id = l.org_id and r.lane_id = l.lane_id and r.rank >= l.cursor_rank offset 0)
               and not exists (select from pause z where z.org_id = l.org_id and z.queue in ('', l.queue)
                               and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')) offset 0)
             limit 1) l) as waits
  from q, a
)
select o.at as before_at, o.seen, o.now, least(2, extract(epoch from o.now - o.at))::float8 as passed_s,
       to_timestamp(20 * floor(extract(epoch from o.now) / 20)) as bucket_at,
       (extract(epoch from o.now) * 1000000)::bigint as now_us,
       coalesce((select v.version from limit_version v), 0) as version, exists (select from room) as has_rooms,
       coalesce((select json_agg(row_to_json(found)) from found), '[]'::json) as queues
from o;

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

-- name: remember
-- Unless somebody else looked since $1, keeps what was seen ($3) at $2 for whoever looks next, adds it to its 20 s and forgets what is older than an hour. Lost in a crash, it is a second less.
with mine as materialized (
  update sampling s set at = $2::timestamptz, seen = $3::json where s.at = $1::timestamptz
  returning set_config('synchronous_commit', 'off', true)
),
gone as (
  delete from fullness where at < $4::timestamptz - interval '62 minutes' and exists (select from mine)
)
insert into fullness as f (kind, name, at, full_s, waited_s, went)
select u.kind, u.name, $4::timestamptz, u.full_s, u.waited_s, u.went
from mine, unnest($5::text[], $6::text[], $7::float8[], $8::float8[], $9::bigint[]) as u(kind, name, full_s, waited_s, went)
on conflict (kind, name, at) do update
  set full_s = f.full_s + excluded.full_s, waited_s = f.waited_s + excluded.waited_s, went = f.went + excluded.went;
