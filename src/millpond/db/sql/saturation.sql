-- Saturation: how full limits and queues are of an org's work, and what waits for room there.

-- name: held
-- Work of an org under leases, and tries of its steps, by what it counts on; looks at the first $2 leases.
with seen as materialized (
  select e.lane_id from lease e where e.org_id = $1 limit $2
)
select l.queue, l.capability, l.keys, h.items, (select count(*) from seen) as looked_at
from (select lane_id, count(*) as items from seen group by lane_id) h
join lane l on l.org_id = $1 and l.lane_id = h.lane_id
union all
select l.queue, l.capability, l.keys || array[''] || t.keys, t.items, (select count(*) from seen)
from (select e.lane_id, s.keys, count(*) as items
      from (select * from step_lease s where s.org_id = $1 and s.since_us is null limit $2) s
      join lease e on e.org_id = s.org_id and e.item_id = s.item_id and e.token = s.token
      group by e.lane_id, s.keys) t
join lane l on l.org_id = $1 and l.lane_id = t.lane_id;

-- name: parked
-- Lanes of an org that stand under full rooms, their ready work, and the age of the oldest; looks at the first $2 lanes, counts to $3.
with seen as materialized (
  select l.lane_id, l.parked_on, l.cursor_rank from lane l where l.org_id = $1 limit $2
),
p as materialized (
  select lane_id, room_base(parked_on) as parked_on, cursor_rank from seen where parked_on is not null
),
w as materialized (
  select p.parked_on from p
  cross join lateral (select from ready r where r.org_id = $1 and r.lane_id = p.lane_id and r.rank >= p.cursor_rank limit $3) r
  limit $3
),
h as materialized (
  select p.parked_on, min(f.rank) as rank from p
  cross join lateral (select r.rank from ready r where r.org_id = $1 and r.lane_id = p.lane_id and r.rank >= p.cursor_rank
                      order by r.rank limit 1) f
  group by p.parked_on
)
select k.looked_at, k.counted, n.room, n.waiting, greatest(0, extract(epoch from clock_timestamp()) - h.rank / 1e6)::float8 as oldest_s
from (select (select count(*) from seen) as looked_at, (select count(*) from w) as counted) k
left join (select parked_on as room, count(*) as waiting from w group by parked_on) n on true
left join h on h.parked_on = n.room;

-- name: slots
-- Slots of live workers by queue, and how many of them are in use.
select s.queue, sum(s.slots::int)::int as slots, coalesce(sum((w.in_use->>s.queue)::int), 0)::int as in_use
from worker w, json_each_text(w.queues) as s(queue, slots)
where w.expires_at > clock_timestamp() and not w.draining
group by s.queue;

-- name: slug
-- What an org is called.
select slug from org where org_id = $1;

-- name: fullness
-- For how long things were full in the last $3 seconds, by what they are called (function of the migrations).
select kind, name, seen_s, full_s, waited_s, went from fullness_of($1::text[], $2::text[], $3);

-- name: held_of_all
-- Leases of all orgs by what they count on (function of the migrations).
select org_id, queue, capability, keys, items from held_of_all()
union all
select org_id, queue, capability, keys, items from seated_of_all();

-- name: parked_of_all
-- Work of all orgs that stands under full rooms (function of the migrations).
select room, waiting, oldest_s, looked_at, counted from parked_of_all($1, $2);

-- name: lines_of_all
-- Ready work of all orgs by queue (function of the migrations).
select queue, orgs, waiting, oldest_s, looked_at from lines_of_all($1, $2);

-- name: orgs_in_line
-- A page of orgs that have work ready or under leases (function of the migrations).
select org_id, slug, in_use, waiting, oldest_s from orgs_in_line($1, $2, $3);

-- name: slugs
-- What orgs are called.
select org_id, slug from org where org_id = any($1::bigint[]);

-- name: declared
-- Keys that flows declare.
select distinct k.key from flow_version f, unnest(f.keys) as k(key);
