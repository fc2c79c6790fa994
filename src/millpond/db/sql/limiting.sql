-- Limits as the claim sees them; all of it after the claim's lock.

-- name: rooms
-- What a claim has to know of limits (function of the migrations).
select kind, org_id, lane_id, queue, capability, keys, room, n, us from claim_rooms($1::text[], $2::text[], $3);

-- name: rules
-- All limits of the installation; for a platform's limit that names an org, that org's id.
select org_id as owner, key, kind, maximum, period_s, burst, null::bigint as of_org from org_limit
union all
select 0, key, kind, maximum, period_s, burst, of_org from platform_limit;

-- name: meters
-- How far rates are used.
select room, tat_us from meter where room = any($1::text[]);

-- name: wake
-- Puts lanes back into the active order: at most so many from each room, in fair order, and lanes given by name.
with f as materialized (
  select exists (select from pause) or exists (select from queue_pause) as has_pauses
),
r as materialized (select * from unnest($1::text[], $2::int[]) as u(room, most)),
p as materialized (
  select l.org_id, l.lane_id, l.queue, r.room
  from f, r cross join lateral (
    select l.org_id, l.lane_id, l.queue
    from unnest($3::text[]) as q(queue) cross join lateral (
      select l.org_id, l.lane_id, l.queue, l.parked_s from lane l
      where l.parked_on = r.room and l.queue = q.queue and not l.active and l.capability = any($4::text[])
        and (not f.has_pauses or not (
          exists (select from queue_pause z where z.queue = l.queue)
          or exists (select from pause z where z.org_id = l.org_id and z.queue in ('', l.queue)
                                           and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')))))
      order by l.parked_s, l.org_id, l.lane_id limit r.most
    ) l
    order by l.parked_s, l.org_id, l.lane_id limit r.most
  ) l
  union
  select l.org_id, l.lane_id, l.queue, l.parked_on
  from unnest($5::bigint[], $6::bigint[]) as u(org_id, lane_id)
  join lane l on l.org_id = u.org_id and l.lane_id = u.lane_id and l.parked_on is not null and not l.active
),
w as (
  update lane set active = true from p where lane.org_id = p.org_id and lane.lane_id = p.lane_id
),
s as (
  update share set active = true,
    virtual_s = greatest(share.virtual_s, (select c.virtual_s from fair_clock c where c.queue = share.queue))
  from (select distinct org_id, queue from p) d
  where share.org_id = d.org_id and share.queue = d.queue and not share.active
)
select r.room, (select count(*) from p where p.room = r.room) as woken,
       exists (select from lane l where l.parked_on = r.room and not l.active
               and not exists (select from p where p.org_id = l.org_id and p.lane_id = l.lane_id)) as has_more
from r;

-- name: plan
-- Sets when rooms are looked at again, in µs since the epoch (-1: never); rooms of $3 have no lane under them any more.
with gone as (
  delete from room where room = any($3::text[])
)
update room set due_at = case u.due_us when -1 then 'infinity' else to_timestamp(u.due_us / 1e6) end
from unnest($1::text[], $2::bigint[]) as u(room, due_us) where room.room = u.room;

-- name: park
-- Parks lanes under the rooms that were full, lets those go of which work went, and notes how full those rooms are.
with u as materialized (
  select * from unnest($1::bigint[], $2::bigint[], $3::text[], $4::float8[], $5::int[], $6::bool[])
    as u(org_id, lane_id, room, virtual_s, needs, has_gone)
),
l as (
  update lane set parked_on = u.room, parked_s = u.virtual_s, needs = u.needs,
    blocked_at = case when u.room is null then null
                      when u.has_gone or lane.blocked_at is null then clock_timestamp() else lane.blocked_at end
  from u where lane.org_id = u.org_id and lane.lane_id = u.lane_id and (u.room is not null or lane.parked_on is not null)
)
insert into room (room, due_at, in_use, maximum)
select room, case due_us when 0 then '-infinity' when -1 then 'infinity' else to_timestamp(due_us / 1e6) end, in_use, maximum
from unnest($7::text[], $8::bigint[], $9::bigint[], $10::bigint[]) as n(room, due_us, in_use, maximum)
on conflict (room) do update
  set due_at = excluded.due_at, in_use = excluded.in_use, maximum = excluded.maximum, looked_at = clock_timestamp();

-- name: spend
-- Stores how far rates are used, and lets this claim's commit wait for the disk: what is spent stays spent.
with d as (select set_config('synchronous_commit', 'on', true))
insert into meter (room, tat_us)
select u.room, u.tat_us from d, unnest($1::text[], $2::bigint[]) as u(room, tat_us)
on conflict (room) do update set tat_us = excluded.tat_us;
