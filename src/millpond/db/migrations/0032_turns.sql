-- Turns: whose turn it is in a room that lanes of several queues need.

-- Crossings: rooms shared by orgs under which lanes of several queues have stood. `virtual_s`: where the last work began that
-- went through, in virtual seconds. By the claim and by what settles charges; upkeep takes those away that are over. Global.
create table crossing (
  room text primary key,
  virtual_s double precision not null
) with (fillfactor = 50);

-- What each org has used of a crossing over all queues, in worker-seconds over its weight; no row: where the crossing is.
create table crossing_share (
  org_id bigint,
  room text,
  virtual_s double precision not null,
  primary key (org_id, room)
) with (fillfactor = 50);
create index crossing_share_turn on crossing_share (room, virtual_s, org_id);

do $$
declare hot text;
begin
  foreach hot in array array['crossing', 'crossing_share'] loop
    execute format('alter table %I set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
      autovacuum_vacuum_cost_delay = 0)', hot);
  end loop;
end $$;

-- A lane that has stood under a crossing (`by_turn`) is found there by its org.
alter table lane add column by_turn boolean;
create index lane_turn on lane (parked_on, org_id, queue, capability) where by_turn and not active;

alter table crossing_share enable row level security;
alter table crossing_share force row level security;
create policy org_scope on crossing_share to millpond_app
  using (org_id = nullif(current_setting('millpond.org', true), '')::bigint)
  with check (org_id = nullif(current_setting('millpond.org', true), '')::bigint);
create policy engine_duty on crossing_share to millpond_engine using (true) with check (true);
grant select, insert, update, delete on crossing, crossing_share to millpond_engine;

-- The rooms that are crossings, read as a statement of its own: after the claim's lock where that comes before it.
create function crossings() returns table (room text)
  language plpgsql volatile rows 1
  set search_path = millpond, pg_temp
as $$
begin
  return query select c.room from crossing c;
end
$$;

-- Moves where orgs stand in crossings by what their work used beyond what its claim was charged, under the claim's lock; the
-- clock of a crossing never stands before all orgs that used it: whoever comes next would begin behind time that nobody used.
create function charge_crossings(orgs bigint[], queues text[], rooms text[], seconds float8[]) returns void
  language plpgsql volatile
  set search_path = millpond, pg_temp
as $$
begin
  perform pg_advisory_xact_lock(7741001);
  update crossing_share x set virtual_s = x.virtual_s + u.virtual_s
  from (
    select u.org_id, u.room, sum(u.seconds / s.weight) as virtual_s
    from unnest(orgs, queues, rooms, seconds) as u(org_id, queue, room, seconds)
    join share s on s.org_id = u.org_id and s.queue = u.queue
    group by u.org_id, u.room
  ) u
  where x.org_id = u.org_id and x.room = u.room;
  update crossing c set virtual_s = m.virtual_s
  from (
    select u.room, (select max(x.virtual_s) from crossing_share x where x.room = u.room) as virtual_s
    from (select distinct u.room from unnest(rooms, seconds) as u(room, seconds) where u.seconds < 0) u
  ) m
  where c.room = m.room and m.virtual_s < c.virtual_s;
end
$$;

-- Takes crossings away under which no lane stands any more, and what tells no more of an org than no row does.
create function drop_crossings() returns bigint
  language plpgsql volatile
  set search_path = millpond, pg_temp
as $$
declare
  gone bigint;
begin
  if not exists (select from crossing) then
    return 0;
  end if;
  perform pg_advisory_xact_lock(7741001);
  delete from crossing c where not exists (select from room r where r.room = c.room);
  get diagnostics gone = row_count;
  delete from crossing_share x where (x.org_id, x.room) in (
    select y.org_id, y.room from crossing_share y left join crossing c on c.room = y.room
    where (c.room is null or y.virtual_s <= c.virtual_s)
      and not exists (select from lane l where l.parked_on = y.room and l.org_id = y.org_id and l.by_turn and not l.active)
    limit 1000);
  return gone;
end
$$;

-- The class of runs for which somebody waits: `interactive`; of most there is none. A flow declares it.
alter table run add column urgency text;
alter table run add constraint run_urgency check (urgency = 'interactive') not valid;
alter table flow_version add column urgency text not null default 'standard' check (urgency in ('standard', 'interactive'));

-- Lanes of interactive work have an odd offset.
create index lane_urgent on lane (queue, org_id) where active and (offset_us & 1) = 1;

-- What a claim reads beside the heads that come first in fair order: those of interactive lanes, of so many orgs of each queue,
-- with the oldest lane of each that is not; the last row has the time (lane_id, µs). Nothing where there are no such lanes.
-- A statement of its own after the claim's lock.
create function claim_urgent(queues text[], orgs integer[], able text[], depth integer)
  returns table (queue text, org_id bigint, weight float8, virtual_s float8, lane_id bigint, offset_us bigint,
                 capability text, ranks bigint[], items uuid[], keys text[])
  language plpgsql volatile rows 10
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  has_pauses boolean;
begin
  perform l.queue from lane l where l.active and (l.offset_us & 1) = 1 order by l.queue, l.org_id limit 1;
  if not found then
    return;
  end if;
  has_pauses := exists (select from pause) or exists (select from queue_pause);
  return query
  select s.queue, s.org_id, s.weight, s.virtual_s, l.lane_id, l.offset_us, l.capability, h.ranks, h.items, l.keys
  from (
    select u.queue, u.orgs from unnest(queues, orgs) as u(queue, orgs)
    where not has_pauses or not exists (select from queue_pause z where z.queue = u.queue)
  ) q
  cross join lateral (
    select s.queue, s.org_id, s.weight, s.virtual_s
    from (
      select distinct l.org_id from lane l
      where l.queue = q.queue and l.active and (l.offset_us & 1) = 1 and l.capability = any(able)
        and (not has_pauses or not exists (
          select from pause z
          where z.org_id = l.org_id and z.queue in ('', l.queue)
            and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))))
    ) u
    join share s on s.org_id = u.org_id and s.queue = q.queue and s.active
    order by s.virtual_s, s.org_id limit q.orgs
  ) s
  cross join lateral (
    select l.lane_id, l.offset_us, l.capability, l.cursor_rank, l.keys
    from (
      select l.*, row_number() over (partition by l.offset_us & 1 order by l.cursor_rank + l.offset_us) as nth
      from lane l
      where l.org_id = s.org_id and l.queue = s.queue and l.active and l.capability = any(able)
        and (not has_pauses or not exists (
          select from pause z
          where z.org_id = l.org_id and z.queue in ('', l.queue)
            and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))))
    ) l
    where l.nth <= case when (l.offset_us & 1) = 1 then 32 else 1 end
  ) l
  left join lateral (
    select array_agg(r.rank order by r.rank, r.item_id) as ranks, array_agg(r.item_id order by r.rank, r.item_id) as items
    from (select r.rank, r.item_id from ready r
          where r.org_id = s.org_id and r.lane_id = l.lane_id and r.rank >= l.cursor_rank
          order by r.rank, r.item_id limit depth) r
  ) h on true;
  return query select '', 0::bigint, 0::float8, 0::float8, (extract(epoch from clock_timestamp()) * 1000000)::bigint, 0::bigint,
                      '', null::bigint[], null::uuid[], null::text[];
end
$$;
