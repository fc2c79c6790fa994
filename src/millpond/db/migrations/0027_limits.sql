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

-- How often limits were changed (one row), counted where a change is stored, so that changes commit in the order of their
-- versions; and what the last of these changed. A claimer that has missed more than these reads all limits anew. Global.
create table limit_version (
  is_one boolean primary key default true check (is_one),
  version bigint not null
) with (fillfactor = 50);
create table limit_change (
  version bigint primary key,
  owner bigint not null,
  key text not null,
  kind text not null
);

-- Limits under which lanes of a queue and capability are parked, or woken from there and not yet met, and when there may be
-- room (µs since the epoch; 0: look at every claim). Only what holds for every worker stands here. `version`: of the limits by
-- which that time was told; `in_use` and `maximum`: what the claim saw that parked there last. By the claim alone. Global.
create table room (
  room text,
  queue text,
  capability text,
  due_us bigint not null,
  version bigint not null,
  in_use bigint,
  maximum bigint not null,
  looked_at timestamptz not null default clock_timestamp(),
  primary key (room, queue, capability)
) with (fillfactor = 50);
create index room_due on room (queue, due_us, room, capability);
create index room_told on room (queue, version) where due_us > 0;

-- Rates: until when the admissions so far have used each (its theoretical arrival time, µs). By claim and upkeep. Global.
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
-- time (`parked_s`); woken from there it is active and keeps that name until work of it goes. Every lane with that name has
-- its row in `room`. `blocked_at`: since when its head, that needs several rooms, has been passed over; a few lanes of each org.
alter table lane
  add column parked_on text,
  add column parked_s double precision,
  add column blocked_at timestamptz;
create index lane_parked on lane (parked_on, queue, capability, parked_s, org_id, lane_id)
  where parked_on is not null and not active;
create index lane_awake on lane (parked_on, queue, capability) where parked_on is not null and active;
create index lane_blocked on lane (blocked_at) where blocked_at is not null;
create index lane_blocked_org on lane (org_id, blocked_at) where blocked_at is not null;

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
grant select on limit_version, limit_change to millpond_engine;
grant select, insert, update, delete on room, meter to millpond_engine;

-- Tells of a change of a limit (owner 0: the platform's); of changes the last thousand are kept.
create function limit_changed(owner bigint, key text, kind text) returns void
  language plpgsql volatile security definer
  set search_path = millpond, pg_temp
as $$
declare
  now_at bigint;
begin
  insert into limit_version as v (version) values (1) on conflict (is_one) do update set version = v.version + 1
  returning v.version into now_at;
  insert into limit_change values (now_at, limit_changed.owner, limit_changed.key, limit_changed.kind);
  delete from limit_change c where c.version <= now_at - 1000;
end
$$;
revoke all on function limit_changed(bigint, text, text) from public;
grant execute on function limit_changed(bigint, text, text) to millpond_app;

-- How full rooms were as the claim parked work there: whoever asks has to know them by name.
create function room_use(rooms text[])
  returns table (room text, in_use bigint, maximum bigint, looked_at timestamptz, tat_us bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select u.room, r.in_use, r.maximum, r.looked_at, m.tat_us
  from unnest(rooms) as u(room)
  left join lateral (
    select x.in_use, x.maximum, x.looked_at from room x where x.room = u.room order by x.looked_at desc limit 1
  ) r on true
  left join meter m on m.room = u.room
$$;
revoke all on function room_use(text[]) from public;
grant execute on function room_use(text[]) to millpond_app;

-- What a claim has to know of limits, read after its lock. The first row has the version of limits (n), the time (us), how long
-- the lock was waited for (org_id, µs) and when the next room is due (lane_id, µs, 0 for none); where more than `most_news` changes are not known, it is the only one. Then:
-- how many leases each lane has (held); a page of the rooms of each queue that are due, after the last of the page before
-- (room: its time n, the meter us; lane_id has bit 0 where this worker can do the work, bit 1 where older limits told the time);
-- the lanes whose heads have been passed over for so long, with since when, and (n) whether this worker could do their work
-- (waiting). Of these, paused ones and those that no live worker can do wait for no room any more, and those are left out for
-- which no worker has a free slot. Everything is bounded but for the leases.
create function claim_rooms(queues text[], able text[], known bigint, most_news bigint, page integer, after_us bigint[],
                            after_room text[], after_able text[], patience_s float8)
  returns table (kind text, org_id bigint, lane_id bigint, queue text, capability text, keys text[], room text, n bigint,
                 us bigint)
  language plpgsql volatile rows 200
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  now_at timestamptz;
  now_us bigint;
  set_version bigint;
  blocked timestamptz;
begin
  perform pg_advisory_xact_lock(7741001);
  now_at := clock_timestamp();
  now_us := (extract(epoch from now_at) * 1000000)::bigint;
  set_version := coalesce((select v.version from limit_version v), 0);
  return query
  select 'now', (extract(epoch from now_at - statement_timestamp()) * 1000000)::bigint,
         coalesce((select min(f.due_us) from unnest(queues) q(queue) cross join lateral (
                     select r.due_us, r.capability from room r where r.queue = q.queue and r.due_us > now_us
                     order by r.due_us limit 16) f
                   where f.capability = any(able)), 0),
         '', '', null::text[], '', set_version, now_us;
  if set_version - known > most_news then
    return;
  end if;
  return query
  select 'held', h.org_id, h.lane_id, l.queue, l.capability, l.keys, '', h.n, null::bigint
  from (select e.org_id, e.lane_id, count(*) as n from lease e group by e.org_id, e.lane_id) h
  join lane l on l.org_id = h.org_id and l.lane_id = h.lane_id;
  return query
  select 'room', 0::bigint, (r.capability = any(able))::int::bigint, r.queue, r.capability, null::text[], r.room, r.due_us, m.tat_us
  from unnest(queues, after_us, after_room, after_able) as q(queue, due_us, room, capability)
  cross join lateral (
    select x.queue, x.capability, x.room, x.due_us from room x
    where x.queue = q.queue and x.due_us <= now_us and (x.due_us, x.room, x.capability) > (q.due_us, q.room, q.capability)
    order by x.due_us, x.room, x.capability limit page
  ) r
  left join meter m on m.room = r.room
  order by r.queue, r.due_us, r.room, r.capability;
  return query
  select 'room', 0::bigint, 2 + (r.capability = any(able))::int::bigint, r.queue, r.capability, null::text[], r.room, r.due_us, m.tat_us
  from unnest(queues) q(queue) cross join lateral (
    select x.queue, x.capability, x.room, x.due_us from room x
    where x.queue = q.queue and x.version < set_version and x.due_us > 0
    order by x.version limit page
  ) r
  left join meter m on m.room = r.room;
  blocked := (select l.blocked_at from lane l where l.blocked_at is not null order by l.blocked_at limit 1);
  if blocked is null or blocked > now_at - patience_s * interval '1 second' then
    return;
  end if;
  return query
  with w as materialized (
    select l.org_id, l.lane_id, l.queue, l.capability, l.keys, l.blocked_at from lane l
    where l.blocked_at <= now_at - patience_s * interval '1 second'
    order by l.blocked_at limit 128
  ),
  d as materialized (
    select w.*, exists (select from worker k where k.expires_at > now_at and not k.draining and k.queues->>w.queue is not null
                                               and rtrim(w.capability, '!') = any(k.capabilities))
      and not exists (select from queue_pause z where z.queue = w.queue)
      and not exists (select from pause z where z.org_id = w.org_id and z.queue in ('', w.queue)
                                            and (z.flow = '' or z.flow || '@' = rtrim(w.capability, '0123456789!'))) as is_due,
      exists (select from worker k where k.expires_at > now_at and not k.draining
              and (k.queues->>w.queue)::int > coalesce((k.in_use->>w.queue)::int, 0)
              and rtrim(w.capability, '!') = any(k.capabilities)) as has_slot
    from w
  ),
  u as (
    update lane set blocked_at = null from d
    where not d.is_due and lane.org_id = d.org_id and lane.lane_id = d.lane_id
  )
  select 'waiting', d.org_id, d.lane_id, d.queue, d.capability, d.keys, '',
         (d.queue = any(queues) and d.capability = any(able))::int::bigint, (extract(epoch from d.blocked_at) * 1000000)::bigint
  from d where d.is_due and d.has_slot order by d.blocked_at;
end
$$;

-- As before, with the keys of lanes, and parked lanes left parked when more work arrives there. The first row has the version
-- of limits in place of an org, and in place of a weight whether lanes are parked anywhere.
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
  has_rooms boolean;
  is_alive boolean;
  version bigint;
begin
  perform pg_advisory_xact_lock(7741001);
  has_rooms := exists (select from room);
  is_alive := exists (select from worker w where w.worker_id = claim_heads.worker);
  version := coalesce((select v.version from limit_version v), 0);
  if not exists (select from arrival) then
    return query select '', version, has_rooms::int::float8, 0::float8, 0::bigint, is_alive::int::bigint, '', null::bigint[],
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
            where not has_rooms or not exists (
              select from lane p where p.org_id = g.org_id and p.lane_id = g.lane_id and p.parked_on is not null and not p.active)
           ) d left join fair_clock c on c.queue = d.queue
      on conflict (org_id, queue) do update
        set active = true, virtual_s = greatest(share.virtual_s, excluded.virtual_s)
        where not share.active
    )
    select '', version, has_rooms::int::float8, 0::float8, (select count(*) from a), is_alive::int::bigint, '', null::bigint[],
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

-- A whole claim in one statement is for where there is nothing to decide: it takes nothing (0) while there are limits, or lanes
-- that stand under one. What it does elsewhere is as before, under another name.
alter function claim_at_once(integer, uuid, uuid, text[], integer[], integer[], text[], float8[], integer) rename to claim_all;
create function claim_at_once(most integer, worker uuid, token uuid, queues text[], slots integer[], orgs integer[],
                              able text[], estimates float8[], depth integer)
  returns table (org_id bigint, item_id uuid, run_id uuid, attempt integer, token_now uuid, deaths smallint, tries smallint,
                 cancel_requested boolean, flow text, version integer, queue text, input json, subject text,
                 timeout_s float8, deadline_at timestamptz, is_rerun boolean, duties smallint, kind text, step_key text,
                 stamp integer, permission text, lent uuid, granted_by text)
  language plpgsql volatile rows 10
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
begin
  perform pg_advisory_xact_lock(7741001);
  if exists (select from room) or exists (select from platform_limit) or exists (select from org_limit) then
    return query select 0::bigint, null::uuid, null::uuid, 0, null::uuid, null::smallint, null::smallint, null::boolean, null,
      null::int, null, null::json, null, null::float8, null::timestamptz, null::boolean, null::smallint, null, null,
      null::int, null, null::uuid, null;
    return;
  end if;
  return query select * from claim_all(most, worker, token, queues, slots, orgs, able, estimates, depth);
end
$$;
