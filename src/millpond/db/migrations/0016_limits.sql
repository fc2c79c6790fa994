-- Limits: ceilings on keys, counted by the claim alone from the leases that there are.

-- What an org limits of its own. `key` is noun:name, noun:* or two of these joined by ×; a rate is `maximum` per
-- `period_s`, up to `burst` of them at once.
create table org_limit (
  org_id bigint not null,
  key text not null check (length(key) between 3 and 500),
  kind text not null check (kind in ('concurrency', 'rate')),
  maximum integer not null check (maximum >= 0),
  period_s double precision check (period_s > 0),
  burst integer check (burst >= 1),
  set_by text not null,
  set_at timestamptz not null default clock_timestamp(),
  primary key (org_id, key, kind),
  check ((kind = 'rate') = (period_s is not null and burst is not null))
);

-- What the platform limits, for all orgs together or (org:*, org:slug) each for itself. `of_org`: the org that the key
-- names exactly; nobody else is shown it. Global.
create table platform_limit (
  key text not null check (length(key) between 3 and 500),
  kind text not null check (kind in ('concurrency', 'rate')),
  maximum integer not null check (maximum >= 0),
  period_s double precision check (period_s > 0),
  burst integer check (burst >= 1),
  of_org bigint,
  set_by text not null,
  set_at timestamptz not null default clock_timestamp(),
  primary key (key, kind),
  check ((kind = 'rate') = (period_s is not null and burst is not null))
);

-- How often limits were changed ('set'), and up to which of these changes a claim has looked at parked lanes anew
-- ('applied'). Two rows, since the claim never waits for a lock that a caller can hold. Global.
create table limit_version (
  name text primary key check (name in ('set', 'applied')),
  version bigint not null
) with (fillfactor = 50);

-- Limits under which lanes are parked, until a claim sees room there, and when to look: -infinity at every claim.
-- `in_use` and `maximum` are what the claim saw that parked there last. Written by the claim alone. Global.
create table room (
  room text primary key,
  due_at timestamptz not null,
  in_use bigint,
  maximum bigint not null,
  looked_at timestamptz not null default clock_timestamp()
) with (fillfactor = 50);
create index room_due on room (due_at);

-- Rates: until when the admissions so far have used each (its theoretical arrival time, µs). Written by the claim. Global.
create table meter (
  room text primary key,
  tat_us bigint not null
) with (fillfactor = 50);

do $$
declare hot text;
begin
  foreach hot in array array['room', 'meter'] loop
    execute format('alter table %I set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
      autovacuum_vacuum_cost_delay = 0)', hot);
  end loop;
end $$;

-- A parked lane has work that may not go: it is not active and stands under one room (`parked_on`) at its org's virtual
-- time (`parked_s`); woken from there it is active and keeps that name until work of it goes. `blocked_at`: since when its
-- head has been passed over; `needs`: in how many rooms it takes a place.
alter table lane
  add column parked_on text,
  add column parked_s double precision,
  add column blocked_at timestamptz,
  add column needs smallint not null default 0;
create index lane_parked on lane (parked_on, queue, parked_s, org_id, lane_id) where parked_on is not null and not active;
create index lane_parked_queue on lane (queue) where parked_on is not null and not active;
create index lane_awake on lane (parked_on) where parked_on is not null and active;
create index lane_overdue on lane (blocked_at) where parked_on is not null and needs > 1;

-- Keys that a flow declares: its runs have them.
alter table flow_version add column keys text[] not null default '{}';

alter table org_limit enable row level security;
alter table org_limit force row level security;
create policy org_scope on org_limit to millpond_app
  using (org_id = nullif(current_setting('millpond.org', true), '')::bigint)
  with check (org_id = nullif(current_setting('millpond.org', true), '')::bigint);
create policy engine_duty on org_limit to millpond_engine using (true) with check (true);
grant select, insert, update, delete on org_limit, platform_limit to millpond_app;
grant select on org_limit, platform_limit to millpond_engine;
grant select, insert, update on limit_version to millpond_app, millpond_engine;
grant select, insert, update, delete on room, meter to millpond_engine;

-- How full rooms were as the claim parked work there: whoever asks has to know them by name.
create function room_use(rooms text[])
  returns table (room text, in_use bigint, maximum bigint, looked_at timestamptz, tat_us bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select u.room, r.in_use, r.maximum, r.looked_at, m.tat_us
  from unnest(rooms) as u(room)
  left join room r on r.room = u.room
  left join meter m on m.room = u.room
$$;
revoke all on function room_use(text[]) from public;
grant execute on function room_use(text[]) to millpond_app;

-- What a claim has to know of limits, read after its lock; the first row has the version of limits (n), the time (us), whether
-- lanes are parked in these queues (lane_id) and when the next room is due (org_id, µs, 0 for none). Then: how many leases
-- each lane has (held); rooms that are due, with how many lanes woken from there still wait and the rate's meter (room);
-- lanes that need several rooms and have been passed over for so long, with since when, and whether this worker could do
-- their work (waiting).
create function claim_rooms(queues text[], able text[], patience_s float8)
  returns table (kind text, org_id bigint, lane_id bigint, queue text, capability text, keys text[], room text, n bigint,
                 us bigint)
  language plpgsql volatile rows 200
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  has_pauses boolean;
  now_at timestamptz;
  set_version bigint;
begin
  perform pg_advisory_xact_lock(7741001);
  now_at := clock_timestamp();
  set_version := coalesce((select v.version from limit_version v where v.name = 'set'), 0);
  if set_version > coalesce((select v.version from limit_version v where v.name = 'applied'), 0) then
    insert into limit_version as v (name, version) values ('applied', set_version)
    on conflict (name) do update set version = excluded.version;
    update room set due_at = '-infinity' where due_at > '-infinity';
  end if;
  return query
  select 'now', coalesce((select (extract(epoch from r.due_at) * 1000000)::bigint from room r
                          where r.due_at > now_at and r.due_at < 'infinity' order by r.due_at limit 1), 0),
         (exists (select from unnest(queues) q(queue)
                  join lane l on l.queue = q.queue and l.parked_on is not null and not l.active))::int::bigint,
         '', '', null::text[], '', set_version, (extract(epoch from now_at) * 1000000)::bigint;
  return query
  select 'held', h.org_id, h.lane_id, l.queue, l.capability, l.keys, '', h.n, null::bigint
  from (select e.org_id, e.lane_id, count(*) as n from lease e group by e.org_id, e.lane_id) h
  join lane l on l.org_id = h.org_id and l.lane_id = h.lane_id;
  return query
  select 'room', 0::bigint, 0::bigint, '', '', null::text[], r.room,
         (select count(*) from lane l where l.parked_on = r.room and l.active and l.queue = any(queues)
                                        and l.capability = any(able)),
         m.tat_us
  from (select x.room from room x where x.due_at <= now_at order by x.due_at limit 2000) r
  left join meter m on m.room = r.room;
  has_pauses := exists (select from pause) or exists (select from queue_pause);
  return query
  select 'waiting', l.org_id, l.lane_id, l.queue, l.capability, l.keys, '',
         (l.queue = any(queues) and l.capability = any(able))::int::bigint, (extract(epoch from l.blocked_at) * 1000000)::bigint
  from lane l
  where l.parked_on is not null and l.needs > 1 and l.blocked_at <= now_at - patience_s * interval '1 second'
    and exists (select from worker w where w.expires_at > now_at and not w.draining and w.queues->>l.queue is not null
                                       and rtrim(l.capability, '!') = any(w.capabilities))
    and (not has_pauses or not (
      exists (select from queue_pause z where z.queue = l.queue)
      or exists (select from pause z where z.org_id = l.org_id and z.queue in ('', l.queue)
                                       and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')))))
  order by l.blocked_at limit 32;
end
$$;

-- As before, with the keys of lanes, the version of limits in place of a capability in the first row, and parked lanes left
-- parked when more work arrives there. Where there are no arrivals it makes no lanes and shares of them.
drop function claim_heads(integer, uuid, text[], integer[], text[], integer);
create function claim_heads(most integer, worker uuid, queues text[], orgs integer[], able text[], depth integer)
  returns table (queue text, org_id bigint, weight float8, virtual_s float8, lane_id bigint, offset_us bigint,
                 capability text, ranks bigint[], items uuid[], keys text[])
  language plpgsql volatile rows 200
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  has_pauses boolean;
  has_limits boolean;
  is_alive boolean;
  version text;
begin
  perform pg_advisory_xact_lock(7741001);
  has_limits := exists (select from limit_version);
  is_alive := exists (select from worker w where w.worker_id = claim_heads.worker);
  version := coalesce((select v.version from limit_version v where v.name = 'set'), 0)::text;
  if not exists (select from arrival) then
    -- To begin and end the statement below takes longer than this look, and a worker that drains a backlog claims often.
    return query select '', 0::bigint, 0::float8, 0::float8, 0::bigint, is_alive::int::bigint, version, null::bigint[],
                        null::uuid[], null::text[];
  else
    return query
    with a as (
      delete from arrival where (org_id, arrival_id) in (select org_id, arrival_id from arrival limit most)
      returning org_id, lane_id, queue, capability, keys, offset_us, min_rank
    ),
    g as materialized (
      select org_id, lane_id, queue, capability, keys, offset_us, min(min_rank) as min_rank
      from a group by org_id, lane_id, queue, capability, keys, offset_us
    ),
    lanes as (
      insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)
      select org_id, lane_id, queue, capability, keys, offset_us, min_rank, true from g
      on conflict (org_id, lane_id) do update
        set active = lane.active or lane.parked_on is null, cursor_rank = least(lane.cursor_rank, excluded.cursor_rank)
        where not lane.active and lane.parked_on is null or excluded.cursor_rank < lane.cursor_rank
    ),
    shares as (
      insert into share (org_id, queue, virtual_s, active)
      select d.org_id, d.queue, coalesce(c.virtual_s, 0), true
      from (select distinct org_id, queue from g
            where not has_limits or not exists (
              select from lane p where p.org_id = g.org_id and p.lane_id = g.lane_id and p.parked_on is not null and not p.active)
           ) d left join fair_clock c on c.queue = d.queue
      on conflict (org_id, queue) do update
        set active = true, virtual_s = greatest(share.virtual_s, excluded.virtual_s)
        where not share.active
    )
    select '', 0::bigint, 0::float8, 0::float8, (select count(*) from a), is_alive::int::bigint, version, null::bigint[],
           null::uuid[], null::text[];
  end if;
  has_pauses := exists (select from pause) or exists (select from queue_pause);
  if has_pauses then
    -- Orgs whose every lane in a queue is paused leave the fair order, without credit for that time: a resume brings them
    -- back by arrivals. One that is under way would not see the lanes made here, so what it lifts is left as it is.
    with c as materialized (
      select s.org_id, s.queue from share s
      where s.queue = any(queues) and s.active
        and exists (select from pause z where z.org_id = s.org_id and z.queue in ('', s.queue))
        and not exists (
          select from lane l where l.org_id = s.org_id and l.queue = s.queue and l.active
            and not exists (select from pause z
                            where z.org_id = l.org_id and z.queue in ('', l.queue)
                              and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))))
    ),
    held as materialized (
      select z.org_id, z.queue, z.flow from pause z
      where z.org_id in (select org_id from c) for key share skip locked
    )
    update share s set active = false from c
    where s.org_id = c.org_id and s.queue = c.queue
      and not exists (
        select from lane l where l.org_id = s.org_id and l.queue = s.queue and l.active
          and not exists (select from held z
                          where z.org_id = l.org_id and z.queue in ('', l.queue)
                            and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))));
  end if;
  return query
  select s.queue, s.org_id, s.weight, s.virtual_s, l.lane_id, l.offset_us, l.capability, h.ranks, h.items, l.keys
  from (
    select u.queue, u.orgs from unnest(queues, orgs) as u(queue, orgs)
    where not has_pauses or not exists (select from queue_pause z where z.queue = u.queue)
  ) q
  cross join lateral (
    select s.queue, s.org_id, s.weight, s.virtual_s
    from share s
    where s.queue = q.queue and s.active
      and exists (select from lane l
                  where l.org_id = s.org_id and l.queue = s.queue and l.active and l.capability = any(able)
                  and (not has_pauses or not exists (
                    select from pause z
                    where z.org_id = l.org_id and z.queue in ('', l.queue)
                      and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')))))
    order by s.virtual_s, s.org_id limit q.orgs
  ) s
  cross join lateral (
    select l.lane_id, l.offset_us, l.capability, l.cursor_rank, l.keys
    from lane l
    where l.org_id = s.org_id and l.queue = s.queue and l.active and l.capability = any(able)
      and (not has_pauses or not exists (
        select from pause z
        where z.org_id = l.org_id and z.queue in ('', l.queue)
          and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))))
    order by l.cursor_rank + l.offset_us limit 64
  ) l
  left join lateral (
    select array_agg(r.rank order by r.rank, r.item_id) as ranks, array_agg(r.item_id order by r.rank, r.item_id) as items
    from (select r.rank, r.item_id from ready r
          where r.org_id = s.org_id and r.lane_id = l.lane_id and r.rank >= l.cursor_rank
          order by r.rank, r.item_id limit depth) r
  ) h on true;
end
$$;
