-- Gauges: for how long limits and queues were full, as somebody looked each second; and who goes before a work item.

-- What a worker tells beside its slots in use: `went`, how many work items of each queue it has taken so far, and `took_s`, how
-- long one of a capability takes.
alter table worker add column told json not null default '{}';

-- When somebody last looked at how full things are (one row), and what was seen then. Global.
create table sampling (
  is_one boolean primary key default true check (is_one),
  at timestamptz not null default clock_timestamp(),
  seen json not null default '{}'
) with (fillfactor = 50);

-- For how long (s), in the 20 s from `at` on, a queue had no free slot for work that waited, a room no place, or work of an org no
-- room: `full_s`; `waited_s`, for how long of it work stood there; `went`, how many work items a full queue let go. The row
-- 'seen' has for how long somebody looked. `name` is a queue, a room, or an org's id. Kept for an hour. Global.
create table fullness (
  kind text not null check (kind in ('seen', 'queue', 'room', 'org')),
  name text not null,
  at timestamptz not null,
  full_s double precision not null default 0,
  waited_s double precision not null default 0,
  went bigint not null default 0,
  primary key (kind, name, at)
) with (fillfactor = 50);
create index fullness_at on fullness (at);
alter table fullness set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);
grant select, insert, update, delete on sampling, fullness to millpond_engine;

-- How long things were full in the last `window_s` seconds, for whoever knows their names; one row for each name, and `seen_s`, for how
-- long somebody looked. An org is told of what is its own or everybody's.
create function fullness_of(kinds text[], names text[], window_s float8)
  returns table (kind text, name text, seen_s float8, full_s float8, waited_s float8, went bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select u.kind, u.name, s.seen_s, coalesce(f.full_s, 0), coalesce(f.waited_s, 0), coalesce(f.went, 0)::bigint
  from unnest(kinds, names) as u(kind, name)
  cross join (select coalesce(sum(x.full_s), 0) as seen_s from fullness x
              where x.kind = 'seen' and x.name = '' and x.at > clock_timestamp() - (window_s + 20) * interval '1 second') s
  cross join (select nullif(current_setting('millpond.org', true), '') as org) a
  left join lateral (
    select sum(x.full_s) as full_s, sum(x.waited_s) as waited_s, sum(x.went) as went from fullness x
    where x.kind = u.kind and x.name = u.name and x.at > clock_timestamp() - (window_s + 20) * interval '1 second'
      and (a.org is null or u.kind = 'queue' or (u.kind = 'org' and u.name = a.org)
           or (u.kind = 'room' and split_part(u.name, ' ', 3) in ('0', a.org)))
  ) f on true
$$;
revoke all on function fullness_of(text[], text[], float8) from public;
grant execute on function fullness_of(text[], text[], float8) to millpond_app;

-- What follows reads the lines of all orgs as a role that nobody can log in as, and tells of them without names, or to operators.
do $$
begin
  execute format('grant create on schema %I to millpond_recorder', current_schema());
end $$;
do $$
declare line text;
begin
  foreach line in array array['lane', 'share', 'ready', 'arrival', 'lease', 'pause'] loop
    execute format('create policy recorder on %I for select to millpond_recorder using (true)', line);
  end loop;
end $$;
grant select on lane, share, ready, arrival to millpond_recorder;
grant select (org_id, lane_id) on lease to millpond_recorder;
grant select (org_id, queue, flow) on pause to millpond_recorder;
grant select on fair_clock, queue_pause to millpond_recorder;

-- The lanes of an org in a queue as the next claim finds them, with the rank to read from: those in the active order that work arrived
-- for or is left in, of capabilities that a worker has (with what an item costs, in worker-seconds), and `also` one more.
create function lanes_in_line(org bigint, in_queue text, able text[], costs float8[], also bigint)
  returns table (lane_id bigint, offset_us bigint, first_rank bigint, cost float8)
  language sql stable  -- without settings of its own, so that it becomes part of the statements that call it
as $$
  select n.lane_id, n.offset_us, min(n.first_rank), min(e.cost)
  from (
    select l.lane_id, l.offset_us, l.capability, l.cursor_rank as first_rank from lane l
    where l.org_id = org and l.queue = in_queue and l.active
    union all
    select a.lane_id, a.offset_us, a.capability, a.min_rank from arrival a
    where a.org_id = org and a.queue = in_queue
      and not exists (select from lane p where p.org_id = org and p.lane_id = a.lane_id and p.parked_on is not null and not p.active)
    union all
    select l.lane_id, l.offset_us, l.capability, l.cursor_rank from lane l
    where l.org_id = org and l.lane_id = also and l.parked_on is not null and not l.active
  ) n
  join unnest(able, costs) as e(able, cost) on e.able = n.capability
  where n.lane_id = also
     or not exists (select from pause z where z.org_id = org and z.queue in ('', in_queue)
                                        and (z.flow = '' or z.flow || '@' = rtrim(n.capability, '0123456789!')))
  group by n.lane_id, n.offset_us
$$;
revoke all on function lanes_in_line(bigint, text, text[], float8[], bigint) from public;

-- What stands before a work item of the org that asks in the fair order of its queue. The first row is its own org's: where that stands
-- (weight, virtual_s) and what each of its items before that one costs, in order; the others, without names, are those of
-- other orgs that come before it or beside it, with what their items cost, in order (at least those of them that go before it).
-- `goes_first`: at the same virtual time. At most so many items are told of, and one more.
create function fair_line(in_queue text, in_lane bigint, in_rank bigint, in_item uuid, able text[], costs float8[], most integer)
  returns table (weight float8, virtual_s float8, goes_first boolean, ahead float8[])
  language plpgsql stable security definer rows 100
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  asking bigint := nullif(current_setting('millpond.org', true), '')::bigint;
  clock_s float8 := coalesce((select c.virtual_s from fair_clock c where c.queue = in_queue), 0);
  least_s float8 := (select min(c) from unnest(costs) c);
  own_weight float8;
  own_s float8;
  own_at bigint;
  own_ahead float8[];
  until_s float8;
  one record;
  line float8[];
  found_before bigint;
begin
  if asking is null then
    return;
  end if;
  select s.weight, case when s.active then s.virtual_s else greatest(s.virtual_s, clock_s) end into own_weight, own_s
  from share s where s.org_id = asking and s.queue = in_queue;
  own_weight := coalesce(own_weight, 1);
  own_s := coalesce(own_s, clock_s);
  own_at := in_rank + coalesce((select l.offset_us from lanes_in_line(asking, in_queue, able, costs, in_lane) l where l.lane_id = in_lane limit 1), 0);
  own_ahead := array(
    select l.cost from lanes_in_line(asking, in_queue, able, costs, in_lane) l
    cross join lateral (
      select r.rank, r.item_id from ready r
      where r.org_id = asking and r.lane_id = l.lane_id and r.rank >= l.first_rank and r.rank <= own_at - l.offset_us
      order by r.rank, r.item_id limit most + 1
    ) r
    where (r.rank + l.offset_us, l.lane_id, r.item_id) < (own_at, in_lane, in_item)
    order by r.rank + l.offset_us, l.lane_id, r.item_id limit most + 1);
  return query select own_weight, own_s, false, own_ahead;
  found_before := cardinality(own_ahead);
  until_s := own_s + coalesce((select sum(c) from unnest(own_ahead) c), 0) / own_weight;
  until_s := until_s + 1e-9 * greatest(1, abs(until_s));
  for one in
    select x.org_id, x.weight, x.virtual_s from (
      (select s.org_id, s.weight, s.virtual_s from share s
       where s.queue = in_queue and s.active and s.virtual_s <= until_s
       order by s.virtual_s, s.org_id limit 4 * (most + 1))
      union all
      (select a.org_id, coalesce(s.weight, 1), greatest(coalesce(s.virtual_s, 0), clock_s)
       from (select distinct r.org_id from (select a.org_id from arrival a where a.queue = in_queue limit 5000) r) a
       left join share s on s.org_id = a.org_id and s.queue = in_queue
       where not coalesce(s.active, false) and greatest(coalesce(s.virtual_s, 0), clock_s) <= until_s)
    ) x
    where x.org_id <> asking order by x.virtual_s, x.org_id
  loop
    exit when found_before > most;
    line := array(
      select l.cost from lanes_in_line(one.org_id, in_queue, able, costs, null) l
      cross join lateral (
        select r.rank, r.item_id from ready r
        where r.org_id = one.org_id and r.lane_id = l.lane_id and r.rank >= l.first_rank
        order by r.rank, r.item_id limit least(most + 1 - found_before, ceil((until_s - one.virtual_s) * one.weight / least_s) + 1)::bigint
      ) r
      order by r.rank + l.offset_us, l.lane_id, r.item_id
      limit least(most + 1 - found_before, ceil((until_s - one.virtual_s) * one.weight / least_s) + 1)::bigint);
    if cardinality(line) > 0 then
      return query select one.weight, one.virtual_s, one.org_id < asking, line;
      found_before := found_before + (
        select count(*) from (
          select one.virtual_s + (sum(u.cost) over (order by u.n) - u.cost) / one.weight as start_s
          from unnest(line) with ordinality as u(cost, n)) c
        where c.start_s < own_s + coalesce((select sum(x) from unnest(own_ahead) x), 0) / own_weight);
    end if;
  end loop;
end
$$;

-- For operators: leases of all orgs by what they count on; only a transaction without an org gets any row, here and below.
create function held_of_all()
  returns table (org_id bigint, queue text, capability text, keys text[], items bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select h.org_id, l.queue, l.capability, l.keys, h.items
  from (select e.org_id, e.lane_id, count(*) as items from lease e group by e.org_id, e.lane_id) h
  join lane l on l.org_id = h.org_id and l.lane_id = h.lane_id
  where nullif(current_setting('millpond.org', true), '') is null
$$;

-- Lanes of all orgs that stand under full rooms, their ready work and the age of the oldest; looks at the first lanes, counts so far.
create function parked_of_all(most_lanes integer, most_items integer)
  returns table (room text, waiting bigint, oldest_s float8, looked_at bigint, counted bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  with p as materialized (
    select l.org_id, l.lane_id, l.parked_on, l.cursor_rank from lane l
    where l.parked_on is not null and not l.active and nullif(current_setting('millpond.org', true), '') is null limit most_lanes
  ),
  w as materialized (
    select p.parked_on from p
    cross join lateral (select from ready r where r.org_id = p.org_id and r.lane_id = p.lane_id and r.rank >= p.cursor_rank limit most_items) r
    limit most_items
  ),
  h as materialized (
    select p.parked_on, min(f.rank) as rank from p
    cross join lateral (select r.rank from ready r where r.org_id = p.org_id and r.lane_id = p.lane_id and r.rank >= p.cursor_rank
                        order by r.rank limit 1) f
    group by p.parked_on
  )
  select h.parked_on, coalesce((select count(*) from w where w.parked_on = h.parked_on), 0),
         greatest(0, extract(epoch from clock_timestamp()) - h.rank / 1e6)::float8, (select count(*) from p), (select count(*) from w)
  from h
$$;

-- Ready work of all orgs by queue, counted so far, of how many orgs it is, and the age of the oldest; looks at the first lanes of each sort.
create function lines_of_all(most_lanes integer, most_items integer)
  returns table (queue text, orgs bigint, waiting bigint, oldest_s float8, looked_at bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  with n as materialized (
    select x.org_id, x.lane_id, x.queue, x.first_rank from (
      (select l.org_id, l.lane_id, l.queue, l.cursor_rank as first_rank from lane l where l.active limit most_lanes)
      union all
      (select l.org_id, l.lane_id, l.queue, l.cursor_rank from lane l where l.parked_on is not null and not l.active limit most_lanes)
      union all
      (select a.org_id, a.lane_id, a.queue, a.min_rank from arrival a limit most_lanes)
    ) x where nullif(current_setting('millpond.org', true), '') is null
  ),
  g as materialized (
    select n.org_id, n.lane_id, n.queue, min(n.first_rank) as first_rank from n group by n.org_id, n.lane_id, n.queue
  ),
  h as materialized (
    select g.queue, g.org_id, g.lane_id, g.first_rank, f.rank from g
    cross join lateral (select r.rank from ready r where r.org_id = g.org_id and r.lane_id = g.lane_id and r.rank >= g.first_rank
                        order by r.rank limit 1) f
  )
  select q.queue, q.orgs, c.waiting, greatest(0, extract(epoch from clock_timestamp()) - q.rank / 1e6)::float8, (select count(*) from n)
  from (select h.queue, count(distinct h.org_id) as orgs, min(h.rank) as rank from h group by h.queue) q
  cross join lateral (
    select count(*) as waiting from (
      select from h cross join lateral (select from ready r where r.org_id = h.org_id and r.lane_id = h.lane_id
                                          and r.rank >= h.first_rank limit most_items) r
      where h.queue = q.queue limit most_items) c
  ) c
$$;

-- A page of the orgs that have work ready or under leases, by slug: how much of each, counted so far, and the age of the oldest.
create function orgs_in_line(after_slug text, most integer, most_items integer)
  returns table (org_id bigint, slug text, in_use bigint, waiting bigint, oldest_s float8)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select o.org_id, o.slug, e.in_use, d.waiting, greatest(0, extract(epoch from clock_timestamp()) - d.rank / 1e6)::float8
  from org o
  cross join lateral (select count(*) as in_use from lease e where e.org_id = o.org_id) e
  cross join lateral (
    select count(*) as waiting, min(w.rank) as rank from (
      select r.rank from (
        select n.lane_id, min(n.first_rank) as first_rank from (
          select l.lane_id, l.cursor_rank as first_rank from lane l where l.org_id = o.org_id and (l.active or l.parked_on is not null)
          union all
          select a.lane_id, a.min_rank from arrival a where a.org_id = o.org_id) n
        group by n.lane_id) n
      cross join lateral (select r.rank from ready r where r.org_id = o.org_id and r.lane_id = n.lane_id and r.rank >= n.first_rank
                          order by r.rank limit most_items) r
      limit most_items) w
  ) d
  where o.slug > after_slug and nullif(current_setting('millpond.org', true), '') is null and (e.in_use > 0 or d.waiting > 0)
  order by o.slug limit most
$$;

do $$
declare told text;
begin
  foreach told in array array[
    'lanes_in_line(bigint, text, text[], float8[], bigint)',
    'fair_line(text, bigint, bigint, uuid, text[], float8[], integer)',
    'held_of_all()', 'parked_of_all(integer, integer)', 'lines_of_all(integer, integer)', 'orgs_in_line(text, integer, integer)'
  ] loop
    execute format('alter function %s owner to millpond_recorder', told);
    execute format('revoke all on function %s from public', told);
    if told not like 'lanes_in_line%' then
      execute format('grant execute on function %s to millpond_app', told);
    end if;
  end loop;
  execute format('revoke create on schema %I from millpond_recorder', current_schema());
end $$;
