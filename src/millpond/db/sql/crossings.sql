-- Crossings as the claim sees them: rooms that lanes of several queues need; read and written under the claim's lock.

-- name: standing
-- Where crossings are, where orgs stand in them, and whether work of these waits there.
select c.room, c.virtual_s as clock_s, x.org_id, x.virtual_s,
       exists (select from lane l where l.parked_on = c.room and l.org_id = x.org_id and l.by_turn and not l.active offset 0)
         or exists (select from lane l where l.parked_on = c.room and l.org_id = x.org_id and l.active offset 0) as is_waiting
from crossing c left join crossing_share x on x.room = any(array[c.room]) and x.org_id = any($2::bigint[])
where c.room = any($1::text[]);

-- name: waiting
-- Lanes that stand under crossings and could go here: of each queue those of the orgs that have used these least; and those that are awake.
with t as materialized (
  select t.room, c.virtual_s as clock_s, q.queue, least(t.most, q.slots) as most
  from unnest($1::text[], $2::int[]) as t(room, most) join crossing c on c.room = any(array[t.room])
  cross join unnest($3::text[], $4::int[]) as q(queue, slots)
  where not exists (select from queue_pause z where z.queue = q.queue)
),
o as materialized (
  select t.room, t.queue, t.most, t.clock_s, x.org_id, x.virtual_s, count(*) over (partition by t.room, t.queue) as orgs
  from t cross join lateral (
    select x.org_id, x.virtual_s from crossing_share x
    where x.room = t.room and exists (
      select from lane l
      where l.parked_on = t.room and l.org_id = x.org_id and l.by_turn and not l.active
        and l.queue = t.queue and l.capability = any($5::text[])
        and not exists (select from pause z where z.org_id = l.org_id and z.queue in ('', l.queue)
                                              and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))) offset 0)
    order by x.virtual_s, x.org_id limit t.most
  ) x
),
w as materialized (
  select o.room, o.clock_s, o.org_id, o.virtual_s, l.lane_id, o.queue, l.capability, l.keys, false as is_awake
  from o cross join lateral (
    select l.lane_id, l.capability, l.keys from lane l
    where l.parked_on = o.room and l.org_id = o.org_id and l.by_turn and not l.active
      and l.queue = o.queue and l.capability = any($5::text[])
    order by l.cursor_rank + l.offset_us limit greatest(4, 2 * o.most / o.orgs)
  ) l
  union all
  select t.room, t.clock_s, l.org_id, 0, l.lane_id, t.queue, l.capability, l.keys, true
  from t cross join lateral (
    select l.org_id, l.lane_id, l.capability, l.keys from lane l
    where l.parked_on = t.room and l.active and l.queue = t.queue and l.capability = any($5::text[]) limit t.most
  ) l
)
select w.room, w.clock_s, w.org_id, w.virtual_s, w.lane_id, w.queue, w.capability, w.keys, w.is_awake, s.weight
from w cross join lateral (select s.weight from share s where s.org_id = w.org_id and s.queue = w.queue
                           order by s.virtual_s desc limit 1) s
where not exists (select from pause z where z.org_id = w.org_id and z.queue in ('', w.queue)
                                        and (z.flow = '' or z.flow || '@' = rtrim(w.capability, '0123456789!')));

-- name: meet
-- Those of these rooms (with the queue of a step that stands there) under which lanes, or steps, of another queue stand.
select distinct u.room from unnest($1::text[], $2::text[]) as u(room, queue)
where exists (select from room r where r.room = u.room and r.queue <> u.queue offset 0)
   or exists (select from unnest($1::text[], $2::text[]) as o(room, queue) where o.room = u.room and o.queue <> u.queue);

-- name: weights
-- The weights of orgs in queues.
select u.org_id, u.queue, s.weight from unnest($1::bigint[], $2::text[]) as u(org_id, queue)
cross join lateral (select s.weight from share s where s.org_id = u.org_id and s.queue = u.queue
                    order by s.virtual_s desc limit 1) s;

-- name: cross
-- Lets rooms be crossings from now on, and the lanes that stand there be found by their orgs.
with c as (
  insert into crossing (room, virtual_s)
  select u.room, coalesce((select max(k.virtual_s) from fair_clock k), 0) from unnest($1::text[]) as u(room)
  on conflict (room) do nothing returning room, virtual_s
),
l as (
  update lane set by_turn = true from c where lane.parked_on = c.room and not lane.active
  returning lane.org_id, lane.parked_on as room
)
insert into crossing_share (org_id, room, virtual_s)
select distinct l.org_id, l.room, c.virtual_s from l join c on c.room = l.room
on conflict (org_id, room) do update set virtual_s = excluded.virtual_s;

-- name: spend
-- Stores where crossings and orgs stand after this claim, and lets lanes that it parked there be found by their orgs.
with c as (
  update crossing set virtual_s = greatest(crossing.virtual_s, u.virtual_s)
  from unnest($1::text[], $2::float8[]) as u(room, virtual_s)
  where crossing.room = any(array[u.room]) and crossing.virtual_s < u.virtual_s
),
l as (
  update lane set by_turn = true from unnest($6::bigint[], $7::bigint[]) as u(org_id, lane_id)
  where lane.org_id = any(array[u.org_id]) and lane.lane_id = any(array[u.lane_id]) and lane.by_turn is not true
)
insert into crossing_share (org_id, room, virtual_s)
select * from unnest($3::bigint[], $4::text[], $5::float8[])
on conflict (org_id, room) do update set virtual_s = excluded.virtual_s
where crossing_share.virtual_s <> excluded.virtual_s;

-- name: drop_over
-- Takes crossings away that are over (function of the migrations).
select drop_crossings();
