-- Limits as the claim sees them; what is read or written there is so after the claim's lock.

-- name: rooms
-- What a claim has to know of limits, which rooms are crossings, what tries of steps count on (functions of the migrations, the first has the lock).
select kind, org_id, lane_id, queue, capability, keys, room, n, us
from claim_rooms($1::text[], $2::text[], $3, $4, $5, $6::bigint[], $7::text[], $8::text[], $9)
union all
select 'crossing', 0, 0, '', '', null, room, 0, null from crossings()
union all
select kind, org_id, lane_id, queue, capability, keys, room, n, us from claim_seated();

-- name: version
-- How often limits were changed.
select coalesce((select version from limit_version), 0);

-- name: changes
-- The changes of limits after a version, with what holds now (no maximum: no limit).
select c.version, c.owner, c.key, c.kind, coalesce(o.maximum, p.maximum) as maximum, coalesce(o.period_s, p.period_s) as period_s,
       coalesce(o.burst, p.burst) as burst, p.of_org, b.until_us, b.factor, b.in_use, b.hits, b.opened_us, b.step, b.reason
from limit_change c
left join lateral (
  select l.maximum, l.period_s, l.burst from org_limit l
  where c.owner <> 0 and l.org_id = c.owner and l.key = c.key and l.kind = c.kind limit 1) o on true
left join lateral (
  select l.maximum, l.period_s, l.burst, l.of_org from platform_limit l
  where c.owner = 0 and l.key = c.key and l.kind = c.kind limit 1) p on true
left join brake b on c.kind = 'brake' and b.owner = c.owner and b.key = c.key
where c.version > $1 order by c.version limit $2;

-- name: rules
-- A page of all limits and brakes; for a platform's limit that names an org, that org's id.
select * from (
  (select 0::bigint as owner, key, kind, maximum, period_s, burst, of_org, null::bigint as until_us, null::float8 as factor,
          null::int as in_use, null::int as hits, null::bigint as opened_us, null::text as step, null::text as reason from platform_limit
   where (0::bigint, key, kind) > ($1::bigint, $2::text, $3::text) order by key, kind limit $4)
  union all
  (select org_id, key, kind, maximum, period_s, burst, null::bigint, null, null, null, null, null, null, null from org_limit
   where (org_id, key, kind) > ($1::bigint, $2::text, $3::text) order by org_id, key, kind limit $4)
  union all
  (select owner, key, 'brake', null, null, null, null, until_us, factor, in_use, hits, opened_us, step, reason from brake
   where (owner, key, 'brake') > ($1::bigint, $2::text, $3::text) order by owner, key limit $4)
) l order by owner, key, kind limit $4;

-- name: meters
-- How far rates are used.
select room, tat_us, pace from meter where room = any($1::text[]);

-- name: forget
-- Lets lanes wait no more for room to be kept.
update lane set blocked_at = null from unnest($1::bigint[], $2::bigint[]) as u(org_id, lane_id)
where lane.org_id = any(array[u.org_id]) and lane.lane_id = any(array[u.lane_id]);

-- name: wake
-- Puts lanes back into the active order: as many as their room has place for beside those awake, in fair order, and some by name.
with f as materialized (
  select exists (select from pause) or exists (select from queue_pause) as has_pauses
),
t as materialized (
  select u.*, case when f.has_pauses then 4 * u.most + 16 else u.most end as depth
  from f, unnest($1::text[], $2::text[], $3::text[], $4::int[], $5::bool[]) as u(room, queue, capability, most, is_free)
),
c as materialized (
  select t.room, t.queue, t.capability, t.most, t.depth, t.is_free, l.org_id, l.lane_id, l.active, l.parked_s
  from t cross join lateral (
    (select a.org_id, a.lane_id, a.active, a.parked_s from lane a
     where a.parked_on = t.room and a.queue = t.queue and a.capability = t.capability and a.active limit t.most + 1)
    union all
    (select p.org_id, p.lane_id, p.active, p.parked_s from lane p
     where p.parked_on = t.room and p.queue = t.queue and p.capability = t.capability and not p.active
     order by p.parked_s, p.org_id, p.lane_id limit t.depth + 1)
  ) l
),
held as materialized (
  select z.org_id, z.queue, z.flow from pause z where z.org_id in (select org_id from c) for key share skip locked
),
h as materialized (
  select c.*, exists (select from held z where z.org_id = c.org_id and z.queue in ('', c.queue)
                                           and (z.flow = '' or z.flow || '@' = rtrim(c.capability, '0123456789!'))) as is_paused
  from c
),
d as materialized (
  -- What is paused, or executed alone, or of a room without a limit, is active like any other: it counts nowhere.
  select h.*, h.is_free or h.is_paused or h.capability like '%!' or exists (select from queue_pause z where z.queue = h.queue) as is_plain
  from h
),
n as materialized (
  select d.*, count(*) filter (where not d.is_plain) over (partition by d.room) as could_go,
         count(*) filter (where not d.is_plain)
           over (partition by d.room order by not d.active, d.parked_s, d.org_id, d.lane_id) as nth
  from d
),
p as materialized (
  select x.org_id, x.lane_id, x.queue, bool_or(x.is_plain) as is_plain, bool_or(x.active) as active, bool_or(x.is_paused) as is_paused
  from (
    select org_id, lane_id, queue, is_plain, active, is_paused from n where is_plain or (not active and nth <= most)
    union all
    select l.org_id, l.lane_id, l.queue, false, false, false
    from unnest($6::bigint[], $7::bigint[]) as u(org_id, lane_id)
    join lane l on l.org_id = any(array[u.org_id]) and l.lane_id = any(array[u.lane_id]) and l.parked_on is not null
      and not l.active
  ) x group by x.org_id, x.lane_id, x.queue
),
w as (
  update lane set active = true, parked_on = case when p.is_plain then null else lane.parked_on end,
    blocked_at = case when p.is_plain then null else lane.blocked_at end
  from p where lane.org_id = any(array[p.org_id]) and lane.lane_id = any(array[p.lane_id])
),
s as (
  -- An org whose work is paused is brought back into the order by whoever resumes it.
  update share set active = true,
    virtual_s = greatest(share.virtual_s,
      (select k.virtual_s from fair_clock k where k.queue = share.queue order by k.virtual_s desc limit 1))
  from (
    select u.org_id, u.queue, h.virtual_s from (select distinct org_id, queue from p where not active and not is_paused) u
    cross join lateral (select h.virtual_s, h.active from share h where h.org_id = u.org_id and h.queue = u.queue
                        order by h.virtual_s desc limit 1) h
    where not h.active
  ) u
  where share.org_id = any(array[u.org_id]) and share.queue = any(array[u.queue]) and share.virtual_s = any(array[u.virtual_s])
)
select t.room, t.queue, t.capability, coalesce(g.is_over, true) as is_over, coalesce(g.has_more, false) as has_more
from t left join (
  select room, queue, capability,
         bool_and(is_plain) and count(*) filter (where active) <= min(most) and count(*) filter (where not active) <= min(depth) as is_over,
         min(could_go) < min(most)
           and (count(*) filter (where active) > min(most) or count(*) filter (where not active) > min(depth)) as has_more
  from n group by room, queue, capability
) g on g.room = t.room and g.queue = t.queue and g.capability = t.capability;

-- name: plan
-- Sets when rooms are looked at again, told by limits of version $5, and takes away those under which no lane stands.
with u as materialized (
  select * from unnest($1::text[], $2::text[], $3::text[], $4::bigint[]) as u(room, queue, capability, due_us)
),
gone as (
  delete from room using u
  where u.due_us is null and room.room = any(array[u.room]) and room.queue = any(array[u.queue])
    and room.capability = any(array[u.capability])
)
update room set due_us = u.due_us, version = $5 from u
where u.due_us is not null and room.room = any(array[u.room]) and room.queue = any(array[u.queue])
  and room.capability = any(array[u.capability]);

-- name: told
-- Notes that the times of all rooms of these queues are told by limits of version $2.
insert into told_rooms as t (queue, version) select u.queue, $2 from unnest($1::text[]) as u(queue)
on conflict (queue) do update set version = greatest(t.version, excluded.version);

-- name: park
-- Parks lanes under the rooms that were full, lets those go of which work went, and notes how full those rooms are; tells of crossings.
with u as materialized (
  select * from unnest($1::bigint[], $2::bigint[], $3::text[], $4::float8[], $5::bool[], $6::bool[])
    as u(org_id, lane_id, room, virtual_s, is_many, has_gone)
),
b as materialized (
  -- Room is kept for the heads of so many lanes of an org at most, so that the line of those that wait is of many orgs.
  select u.org_id, u.lane_id,
         row_number() over (partition by u.org_id order by u.lane_id)
           + (select count(*) from (select from lane k where k.org_id = u.org_id and k.blocked_at is not null
                                   order by k.blocked_at limit $12) k) <= $12 as fits
  from u join lane l on l.org_id = any(array[u.org_id]) and l.lane_id = any(array[u.lane_id])
  where u.room is not null and u.is_many and l.blocked_at is null
),
l as (
  update lane set parked_on = u.room, parked_s = u.virtual_s,
    blocked_at = case when u.room is null or not u.is_many then null
                      when lane.blocked_at is not null and not u.has_gone then lane.blocked_at
                      when lane.blocked_at is not null or b.fits then clock_timestamp() end
  from u left join b on b.org_id = u.org_id and b.lane_id = u.lane_id
  where lane.org_id = any(array[u.org_id]) and lane.lane_id = any(array[u.lane_id])
    and (u.room is not null or lane.parked_on is not null)
  returning lane.parked_on, lane.queue, lane.capability
),
r as (
  insert into room (room, queue, capability, due_us, version, in_use, maximum)
  select distinct l.parked_on, l.queue, l.capability, n.due_us, $11::bigint, n.in_use, n.maximum
  from l join unnest($7::text[], $8::bigint[], $9::bigint[], $10::bigint[]) as n(room, due_us, in_use, maximum) on n.room = l.parked_on
  on conflict (room, queue, capability) do update
    set due_us = excluded.due_us, version = excluded.version, in_use = excluded.in_use, maximum = excluded.maximum,
        looked_at = clock_timestamp()
  returning room, queue
)
-- Those that orgs share ($13) and under which lanes of another queue stand.
select distinct r.room from r
where r.room = any($13::text[])
  and (exists (select from room o where o.room = r.room and o.queue <> r.queue) or exists (select from r o where o.room = r.room and o.queue <> r.queue));

-- name: spend
-- Stores how far rates are used, and lets this claim's commit wait for the disk: what is spent stays spent.
with d as (select set_config('synchronous_commit', 'on', true))
insert into meter (room, tat_us, pace)
select u.room, u.tat_us, u.pace from d, unnest($1::text[], $2::bigint[], $3::float8[]) as u(room, tat_us, pace)
on conflict (room) do update set tat_us = excluded.tat_us, pace = excluded.pace;

-- name: old_meters
-- A page of meters, and which are past.
select room, tat_us, tat_us < (extract(epoch from clock_timestamp()) * 1000000)::bigint as is_past
from meter where room > $1 order by room limit $2;

-- name: drop_meters
-- Deletes meters that have not moved since they were read.
with d as (
  delete from meter m using unnest($1::text[], $2::bigint[]) as u(room, tat_us)
  where m.room = any(array[u.room]) and m.tat_us = u.tat_us
  returning m.room
)
select count(*) from d;
