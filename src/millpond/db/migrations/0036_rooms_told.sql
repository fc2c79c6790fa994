-- Rooms are looked at again where their own limits changed; room is kept for queues whose slots go round; breakers end.

-- Up to which version of limits the times of a queue's rooms are told. By the claim alone. Global.
create table told_rooms (
  queue text primary key,
  version bigint not null
) with (fillfactor = 50);
grant select, insert, update, delete on told_rooms to millpond_engine;
-- The third word of a room is the org whose work alone takes places there, 0 for everybody's.
create index room_of on room (queue, split_part(room, ' ', 3), version) where due_us > 0;

-- What a claim has to know of limits, read after its lock. The first row has the version of limits (n), the time (us), how long
-- the lock was waited for (org_id, µs), when the next room is due (lane_id, µs, 0 for none), and the queues of whose rooms some
-- times are told by older limits (keys); where more than `most_news` changes are not known, it is the only one. Then:
-- how many leases each lane has (held); a page of the rooms of each queue that are due, after the last of the page before
-- (room: its time n, the meter us; lane_id has bit 0 where this worker can do the work, bit 1 where its time is to be told anew,
-- since a limit of the org that it is of has changed, or one of the platform's);
-- the lanes whose heads have been passed over for so long, with since when, and (n) whether this worker could do their work
-- (waiting). Of these, paused ones and those that no live worker can do wait for no room any more, and those are left out of
-- whose queue no worker has a free slot, by what workers told a second ago, nor has this one, nor anybody claimed of late.
-- Everything is bounded but for the leases.
create or replace function claim_rooms(queues text[], able text[], known bigint, most_news bigint, page integer, after_us bigint[],
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
  told bigint;
  behind text[] := '{}';
  blocked timestamptz;
begin
  perform pg_advisory_xact_lock(7741001);
  now_at := clock_timestamp();
  now_us := (extract(epoch from now_at) * 1000000)::bigint;
  set_version := coalesce((select v.version from limit_version v), 0);
  select array_agg(u.queue), min(u.version) into behind, told from (
    select q.queue, coalesce((select t.version from told_rooms t where t.queue = q.queue), 0) as version
    from unnest(queues) q(queue)
  ) u where u.version < set_version;
  return query
  select 'now', (extract(epoch from now_at - statement_timestamp()) * 1000000)::bigint,
         coalesce((select min(f.due_us) from unnest(queues) q(queue) cross join lateral (
                     select r.due_us, r.capability from room r where r.queue = q.queue and r.due_us > now_us
                     order by r.due_us limit 16) f
                   where f.capability = any(able)), 0),
         '', '', behind, '', set_version, now_us;
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
  if told is null then
    null;
  elsif told < (select coalesce(min(c.version), set_version + 1) - 1 from limit_change c)
     or exists (select from limit_change c where c.owner = 0 and c.version > told) then
    return query
    select 'room', 0::bigint, 2 + (r.capability = any(able))::int::bigint, r.queue, r.capability, null::text[], r.room, r.due_us, m.tat_us
    from unnest(behind) q(queue) cross join lateral (
      select x.queue, x.capability, x.room, x.due_us from room x
      where x.queue = q.queue and x.version < set_version and x.due_us > 0
      order by x.version limit page
    ) r
    left join meter m on m.room = r.room;
  else
    return query
    with o as materialized (
      select c.owner::text as owner, max(c.version) as version from limit_change c where c.version > told group by c.owner
    )
    select 'room', 0::bigint, 2 + (r.capability = any(able))::int::bigint, r.queue, r.capability, null::text[], r.room, r.due_us, m.tat_us
    from unnest(behind) q(queue) cross join lateral (
      select x.queue, x.capability, x.room, x.due_us
      from o cross join lateral (
        select y.queue, y.capability, y.room, y.due_us from room y
        where y.queue = q.queue and split_part(y.room, ' ', 3) = o.owner and y.version < o.version and y.due_us > 0
        limit page
      ) x limit page
    ) r
    left join meter m on m.room = r.room;
  end if;
  blocked := (select l.blocked_at from lane l where l.blocked_at is not null order by l.blocked_at limit 1);
  if blocked is null or blocked > now_at - patience_s * interval '1 second' then
    return;
  end if;
  return query
  with g as materialized (
    select distinct l.queue from lease e join lane l on l.org_id = e.org_id and l.lane_id = e.lane_id
    where e.claimed_at > now_at - patience_s * interval '1 second'
  ),
  w as materialized (
    select x.org_id, x.lane_id, x.queue, x.capability, x.keys, x.blocked_at
    from (
      select l.org_id, l.lane_id, l.queue, l.capability, l.keys, l.blocked_at from lane l
      where l.blocked_at <= now_at - patience_s * interval '1 second'
      order by l.blocked_at limit 1024
    ) x
    -- Those that nobody has a slot for just now, as long as they are served, are passed over: others wait behind them.
    where x.queue = any(queues) or exists (select from g where g.queue = x.queue)
      or coalesce((select bool_or((k.queues->>x.queue)::int > coalesce((k.in_use->>x.queue)::int, 0)) from worker k
                   where k.expires_at > now_at and not k.draining and k.queues->>x.queue is not null), true)
    limit 128
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
  from d
  where d.is_due and (d.has_slot or (d.queue = any(queues) and d.capability = any(able)) or exists (select from g where g.queue = d.queue))
  order by d.blocked_at;
end
$$;

-- A breaker that nobody probes ends too.
drop index brake_over;
create index brake_over on brake (over_us);
update brake set over_us = until_us + 3600000000 where opened_us is not null;

-- As before, without breakers that are over.
create or replace function brakes()
  returns table (owner bigint, key text, until_us bigint, factor double precision, in_use integer, hits integer,
                 opened_us bigint, step text, reason text, now_us bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select b.owner, b.key, b.until_us, b.factor, b.in_use, b.hits, b.opened_us, b.step, b.reason, n.now_us
  from brake b, (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as now_us) n
  where b.owner in (0, nullif(current_setting('millpond.org', true), '')::bigint) and b.over_us > n.now_us
$$;
