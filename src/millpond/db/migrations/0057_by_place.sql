-- A claim reads and changes the rows that every claim changes without a look at their former versions.
--
-- While any client's transaction is open, no version of a row that came after it can be cleaned away, and whoever looks a row up
-- by its key comes by all of them: after ten minutes that was most of what a claim did (decision 46). Where an org stands, and the
-- clock of a queue, only grow, but for what orgs are given back. So that is the last column of their keys: the row as it is
-- now is the first from behind, and is changed by its place there. What makes either unique but for that column is the claim's lock,
-- under which alone they are written.

-- Autovacuum finds nothing to clean away then, while it goes through these tables every few seconds, as fast as it can,
-- and they grow: so no faster than that 50,000 pages of each take a second. They have a few thousand at other times.
do $$
declare hot text;
begin
  foreach hot in array array['ready', 'arrival', 'lease', 'lane', 'share', 'item', 'timer', 'worker', 'fair_clock', 'usage_part',
                             'step_lease', 'step_need', 'reservation', 'lease_use', 'run_use', 'delta'] loop
    execute format('alter table %I set (autovacuum_vacuum_cost_delay = 4, autovacuum_vacuum_cost_limit = 200)', hot);
  end loop;
end $$;
-- Every run leaves one former version, in its page, where whoever writes there next clears it away. What is inserted, and what
-- retention deletes beside that, lets it be vacuumed.
alter table run set (autovacuum_vacuum_scale_factor = 1.25);

-- As claims do, share first.
lock table share, fair_clock in access exclusive mode;
alter table share drop constraint share_pkey;
alter table share add constraint share_pkey primary key (org_id, queue, virtual_s);
-- No active org of a queue stands before `least_s`: who is made active begins at the queue's clock, which it never passes.
alter table fair_clock add column least_s double precision not null default '-infinity';
alter table fair_clock drop constraint fair_clock_pkey;
alter table fair_clock add constraint fair_clock_pkey primary key (queue, virtual_s);

-- As before, by place, and arrivals are looked through once.
create or replace function claim_heads(most integer, worker uuid, queues text[], orgs integer[], able text[], depth integer)
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
  came tid[];
begin
  perform pg_advisory_xact_lock(7741001);
  has_rooms := exists (select from room);
  is_alive := exists (select from worker w where w.worker_id = claim_heads.worker);
  version := coalesce((select v.version from limit_version v), 0);
  came := array(select ctid from arrival limit most);
  if came = '{}' then
    return query select '', version, has_rooms::int::float8, 0::float8, 0::bigint, is_alive::int::bigint, '', null::bigint[],
                        null::uuid[], null::text[];
  else
    return query
    with a as (
      delete from arrival where ctid = any(came)
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
    d as materialized (
      select d.org_id, d.queue, coalesce(c.virtual_s, 0) as clock_s, p.virtual_s, p.active
      from (select distinct org_id, queue from g
            where not has_rooms or not exists (
              select from lane p where p.org_id = g.org_id and p.lane_id = g.lane_id and p.parked_on is not null and not p.active)
           ) d
      left join lateral (select c.virtual_s from fair_clock c where c.queue = d.queue order by c.virtual_s desc limit 1) c on true
      left join lateral (select s.virtual_s, s.active from share s where s.org_id = d.org_id and s.queue = d.queue
                         order by s.virtual_s desc limit 1) p on true
    ),
    woken as (
      update share set active = true, virtual_s = greatest(d.virtual_s, d.clock_s)
      from d where not d.active and share.org_id = any(array[d.org_id]) and share.queue = any(array[d.queue])
        and share.virtual_s = any(array[d.virtual_s])
    ),
    begun as (
      insert into share (org_id, queue, virtual_s, active)
      select d.org_id, d.queue, d.clock_s, true from d where d.virtual_s is null
    )
    select '', version, has_rooms::int::float8, 0::float8, (select count(*) from a), is_alive::int::bigint, '', null::bigint[],
           null::uuid[], null::text[];
  end if;
  has_pauses := exists (select from pause) or exists (select from queue_pause);
  if has_pauses then
    -- Orgs whose every lane in a queue is paused leave the fair order, without credit for that time: a resume brings them
    -- back by arrivals. One that is under way would not see the lanes made here, so what it lifts is left as it is.
    with c as materialized (
      select s.org_id, s.queue
      from (select distinct z.org_id from pause z) z
      cross join lateral (
        select s.org_id, s.queue from share s
        where s.org_id = z.org_id and s.queue = any(queues) and s.active
          and exists (select from pause z where z.org_id = s.org_id and z.queue in ('', s.queue) offset 0)
          and not exists (
            select from lane l where l.org_id = s.org_id and l.queue = s.queue and l.active
              and not exists (select from pause z
                              where z.org_id = l.org_id and z.queue in ('', l.queue)
                                and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')) offset 0)
            offset 0)
        offset 0
      ) s
    ),
    held as materialized (
      select z.org_id, z.queue, z.flow from (select distinct c.org_id from c) o
      cross join lateral (
        select z.org_id, z.queue, z.flow from pause z where z.org_id = o.org_id for key share skip locked
      ) z
    )
    update share s set active = false from c
    where s.org_id = any(array[c.org_id]) and s.queue = any(array[c.queue])
      and not exists (
        select from lane l where l.org_id = s.org_id and l.queue = s.queue and l.active
          and not exists (select from held z
                          where z.org_id = l.org_id and z.queue in ('', l.queue)
                            and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')))
        offset 0);
  end if;
  return query
  select s.queue, s.org_id, s.weight, s.virtual_s, l.lane_id, l.offset_us, l.capability, h.ranks, h.items, l.keys
  from (
    select u.queue, u.orgs,
           coalesce((select c.least_s from fair_clock c where c.queue = u.queue order by c.virtual_s desc limit 1), '-infinity') as least_s
    from unnest(queues, orgs) as u(queue, orgs)
    where not has_pauses or not exists (select from queue_pause z where z.queue = u.queue)
  ) q
  cross join lateral (
    select s.queue, s.org_id, s.weight, s.virtual_s
    from share s
    where s.queue = q.queue and s.active and s.virtual_s >= q.least_s
      and exists (select from lane l
                  where l.org_id = s.org_id and l.queue = s.queue and l.active and l.capability = any(able)
                  and (not has_pauses or not exists (
                    select from pause z
                    where z.org_id = l.org_id and z.queue in ('', l.queue)
                      and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))))
                  offset 0)
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
    select array_agg(r.rank) as ranks, array_agg(r.item_id) as items
    from (select r.rank, r.item_id from ready r
          where r.org_id = s.org_id and r.lane_id = l.lane_id and r.rank >= l.cursor_rank
          order by r.rank, r.item_id limit depth) r
  ) h on true;
end
$$;

-- As before, by place. A lane whose cursor is below 0 goes on as it was stored: what was taken of it is passed over again.
create or replace function claim_take(
    orgs bigint[], lanes bigint[], ranks bigint[], items uuid[], worker uuid, token uuid,
    moved_orgs bigint[], moved_lanes bigint[], cursors bigint[], actives boolean[],
    changed_orgs bigint[], changed_queues text[], virtuals float8[], maybe_empty boolean[],
    clock_queues text[], clocks float8[])
  returns table (org_id bigint, item_id uuid, run_id uuid, attempt integer, token_now uuid, deaths smallint, tries smallint,
                 cancel_requested boolean, flow text, version integer, queue text, input json, subject text,
                 timeout_s float8, deadline_at timestamptz, is_rerun boolean, duties smallint, kind text, step_key text,
                 stamp integer, permission text, lent uuid, granted_by text)
  language plpgsql volatile rows 100
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  with free as materialized (
    select p.org_id, p.lane_id, p.rank, p.item_id
    from unnest(orgs, lanes, ranks, items) as p(org_id, lane_id, rank, item_id)
    cross join lateral (
      select from item i where i.org_id = p.org_id and i.item_id = p.item_id
        and i.state = 'queued' and i.rank = p.rank and i.lane_id = p.lane_id
      for update skip locked
    ) i
  ),
  gone as (
    delete from ready r using free f
    where r.org_id = any(array[f.org_id]) and r.lane_id = any(array[f.lane_id]) and r.rank = any(array[f.rank])
      and r.item_id = any(array[f.item_id])
    returning r.org_id, r.item_id
  ),
  taken as (
    update item i set state = 'running', token = claim_take.token, attempt = i.attempt + 1, event_no = i.event_no + 1,
                      started_at = coalesce(i.started_at, clock_timestamp())
    from gone g where i.org_id = any(array[g.org_id]) and i.item_id = any(array[g.item_id])
    returning i.org_id, i.item_id, i.run_id, i.lane_id, i.attempt, i.event_no, i.deaths, i.tries, i.cancel_requested,
              i.duties, i.kind, i.queue, i.step_key
  ),
  l as materialized (
    select * from unnest(moved_orgs, moved_lanes, cursors, actives) as u(org_id, lane_id, cursor_rank, active)
  ),
  stored as (
    update lane set cursor_rank = l.cursor_rank, active = l.active
    from l where l.cursor_rank >= 0 and lane.org_id = any(array[l.org_id]) and lane.lane_id = any(array[l.lane_id])
    returning lane.org_id, lane.lane_id, lane.queue, lane.keys
  ),
  moved as (
    select m.org_id, m.lane_id, m.queue, m.keys from stored m
    union all
    -- Goes on as it is read from.
    select n.org_id, n.lane_id, n.queue, n.keys from l
    cross join lateral (select n.org_id, n.lane_id, n.queue, n.keys from lane n
                        where n.org_id = l.org_id and n.lane_id = l.lane_id offset 0) n
    where l.cursor_rank < 0
  ),
  leases as (
    insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)
    select t.org_id, t.item_id, t.run_id, t.lane_id, n.queue, n.keys, worker, t.attempt, claim_take.token
    from taken t
    -- A full join, since that is never made a loop which compares each with each.
    full join moved m on m.org_id = t.org_id and m.lane_id = t.lane_id
    cross join lateral (
      select m.queue, m.keys where m.lane_id is not null
      union all
      -- A run that goes for its steps' sake stands in another lane than they.
      select x.queue, x.keys from lane x where m.lane_id is null and x.org_id = t.org_id and x.lane_id = t.lane_id
    ) n
    where coalesce(t.attempt, 0) > 0
  ),
  events as (
    insert into event (org_id, run_id, event_no, kind, data)
    select t.org_id, t.run_id, t.event_no, case when t.attempt = 1 then 'run.started' else 'run.resumed' end,
           json_build_object('attempt', t.attempt)
    -- Steps in other queues tell of their start themselves: the live row of their run is not to be locked here.
    from taken t where t.kind = 'run'
  ),
  s as materialized (
    select u.org_id, u.queue, u.virtual_s, u.maybe_empty, p.virtual_s as stood_s
    from unnest(changed_orgs, changed_queues, virtuals, maybe_empty) as u(org_id, queue, virtual_s, maybe_empty)
    cross join lateral (select p.virtual_s from share p where p.org_id = u.org_id and p.queue = u.queue
                        order by p.virtual_s desc limit 1) p
  ),
  shares as (
    update share set virtual_s = s.virtual_s,
      active = not s.maybe_empty or exists (
        select from lane x where x.org_id = s.org_id and x.queue = s.queue and x.active
          and (x.org_id, x.lane_id) not in (select l.org_id, l.lane_id from l where not l.active) offset 0)
    from s where share.org_id = any(array[s.org_id]) and share.queue = any(array[s.queue])
      and share.virtual_s = any(array[s.stood_s])
  ),
  c as materialized (
    -- What stands first now, or will by what is changed here.
    select u.queue, p.virtual_s as stood_s, greatest(p.virtual_s, u.virtual_s) as virtual_s, f.virtual_s as first_s, u.changed_s
    from (
      select n.queue, max(n.clock_s) as virtual_s, min(n.changed_s) as changed_s
      from (
        select u.queue, u.clock_s, null::float8 as changed_s from unnest(clock_queues, claim_take.clocks) as u(queue, clock_s)
        union all
        select s.queue, null, s.virtual_s from s
      ) n group by n.queue
    ) u
    left join lateral (select p.virtual_s, p.least_s from fair_clock p where p.queue = u.queue
                       order by p.virtual_s desc limit 1) p on true
    left join lateral (select f.virtual_s from share f where f.queue = u.queue and f.active and f.virtual_s >= p.least_s
                       order by f.virtual_s limit 1) f on true
  ),
  clocks as (
    update fair_clock set virtual_s = c.virtual_s, least_s = least(c.first_s, c.changed_s, c.virtual_s)
    from c where fair_clock.queue = any(array[c.queue]) and fair_clock.virtual_s = any(array[c.stood_s])
  ),
  begun as (
    insert into fair_clock (queue, virtual_s) select c.queue, c.virtual_s from c where c.stood_s is null and c.virtual_s is not null
  )
  select t.org_id, t.item_id, t.run_id, t.attempt, claim_take.token, t.deaths, t.tries, t.cancel_requested, r.flow,
         r.version, coalesce(t.queue, r.queue), case when t.kind = 'run' then r.input end, r.subject, r.timeout_s,
         r.deadline_at, r.rerun_of is not null, t.duties, t.kind, t.step_key, r.stamp, r.permission, r.lent, r.granted_by
  from taken t join run r on r.org_id = any(array[t.org_id]) and r.run_id = any(array[t.run_id]);
end
$$;

-- As before, by place.
create or replace function claim_at_once(most integer, worker uuid, token uuid, queues text[], slots integer[], orgs integer[],
                              able text[], estimates float8[], depth integer)
  returns table (org_id bigint, item_id uuid, run_id uuid, attempt integer, token_now uuid, deaths smallint, tries smallint,
                 cancel_requested boolean, flow text, version integer, queue text, input json, subject text,
                 timeout_s float8, deadline_at timestamptz, is_rerun boolean, duties smallint, kind text, step_key text,
                 stamp integer, permission text, lent uuid, granted_by text)
  language plpgsql volatile rows 10
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  empty_rank constant bigint := 4611686018427387904;
  came record;
  place record;
  head record;
  one record;
begin
  perform pg_advisory_xact_lock(7741001);
  if exists (select from room) or exists (select from platform_limit) or exists (select from org_limit)
     or exists (select from brake) then
    return query select 0::bigint, null::uuid, null::uuid, 0, null::uuid, null::smallint, null::smallint, null::boolean, null,
      null::int, null, null::json, null, null::float8, null::timestamptz, null::boolean, null::smallint, null, null,
      null::int, null, null::uuid, null;
    return;
  end if;
  select v.org_id, v.arrival_id, v.lane_id, v.queue, v.capability, v.keys, v.offset_us, v.min_rank into came
  from arrival v limit 1;
  if found and came.queue = any(queues) and came.capability = any(able) and most > 0 and depth > 1
     and slots[array_position(queues, came.queue)] > 0
     and not exists (select from arrival limit 1 offset 1) then
    select l.lane_id, coalesce(s.weight, 1) as weight, s.virtual_s as stood_s, c.virtual_s as clock_s,
           greatest(s.virtual_s, c.virtual_s, 0) as virtual_s,
           least(l.cursor_rank, came.min_rank) as from_rank, l.cursor_rank into place
    from worker w
    left join lane l on l.org_id = came.org_id and l.lane_id = came.lane_id
    left join lateral (select s.weight, s.virtual_s from share s where s.org_id = came.org_id and s.queue = came.queue
                       order by s.virtual_s desc limit 1) s on true
    left join lateral (select c.virtual_s from fair_clock c where c.queue = came.queue order by c.virtual_s desc limit 1) c on true
    where w.worker_id = claim_at_once.worker
      and (l.lane_id is null or not l.active and l.parked_on is null)
      and not exists (
        select from unnest(claim_at_once.queues) as q(queue) cross join lateral (
          select from share x where x.queue = q.queue and x.active
            and x.virtual_s >= coalesce((select k.least_s from fair_clock k where k.queue = q.queue order by k.virtual_s desc limit 1),
                                        '-infinity') limit 1
        ) x)
      and not exists (select from pause) and not exists (select from queue_pause);
    if found then
      select array_agg(h.rank) as ranks, array_agg(h.item_id) as items into head
      from (select r.rank, r.item_id from ready r
            where r.org_id = came.org_id and r.lane_id = came.lane_id and r.rank >= place.from_rank
            order by r.rank, r.item_id limit 2) h;
      if cardinality(head.items) = 1 then
        perform from item i
        where i.org_id = came.org_id and i.item_id = head.items[1]
          and i.state = 'queued' and i.rank = head.ranks[1] and i.lane_id = came.lane_id
        for update skip locked;
        if found then
          update item i set state = 'running', token = claim_at_once.token, attempt = i.attempt + 1, event_no = i.event_no + 1,
                            started_at = coalesce(i.started_at, clock_timestamp())
          where i.org_id = came.org_id and i.item_id = head.items[1]
          returning i.run_id, i.attempt, i.event_no, i.deaths, i.tries, i.cancel_requested, i.duties, i.kind, i.queue, i.step_key
          into one;
          delete from arrival v where v.org_id = came.org_id and v.arrival_id = came.arrival_id;
          delete from ready r where r.org_id = came.org_id and r.lane_id = came.lane_id and r.rank = head.ranks[1]
            and r.item_id = head.items[1];
          insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)
          values (came.org_id, head.items[1], one.run_id, came.lane_id, came.queue, came.keys, worker, one.attempt, token);
          -- Steps in other queues tell of their start themselves: the live row of their run is not to be locked here.
          if one.kind = 'run' then
            insert into event (org_id, run_id, event_no, kind, data)
            values (came.org_id, one.run_id, one.event_no, case when one.attempt = 1 then 'run.started' else 'run.resumed' end,
                    json_build_object('attempt', one.attempt));
          end if;
          if place.lane_id is null then
            insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)
            values (came.org_id, came.lane_id, came.queue, came.capability, came.keys, came.offset_us, empty_rank, false);
          elsif place.cursor_rank <> empty_rank then
            update lane l set cursor_rank = empty_rank where l.org_id = came.org_id and l.lane_id = came.lane_id;
          end if;
          if place.stood_s is null then
            insert into share (org_id, queue, virtual_s, active)
            values (came.org_id, came.queue,
                    place.virtual_s + estimates[array_position(able, came.capability)] / place.weight, false);
          else
            update share s set virtual_s = place.virtual_s + estimates[array_position(able, came.capability)] / place.weight
            where s.org_id = came.org_id and s.queue = came.queue and s.virtual_s = place.stood_s;
          end if;
          -- Nobody waits in this queue: who does next begins at its clock.
          if place.clock_s is null then
            insert into fair_clock (queue, virtual_s, least_s) values (came.queue, place.virtual_s, place.virtual_s);
          elsif place.clock_s < place.virtual_s then
            update fair_clock c set virtual_s = place.virtual_s, least_s = place.virtual_s
            where c.queue = came.queue and c.virtual_s = place.clock_s;
          end if;
          return query
          select 1::bigint, null::uuid, null::uuid, 1, null::uuid, null::smallint, null::smallint, null::boolean, null,
                 null::int, null, null::json, null, null::float8, null::timestamptz, null::boolean, null::smallint, null, null,
                 null::int, null, null::uuid, null;
          return query
          select came.org_id, head.items[1], one.run_id, one.attempt, claim_at_once.token, one.deaths, one.tries,
                 one.cancel_requested, r.flow, r.version, coalesce(one.queue, r.queue), case when one.kind = 'run' then r.input end,
                 r.subject, r.timeout_s, r.deadline_at, r.rerun_of is not null, one.duties, one.kind, one.step_key, r.stamp,
                 r.permission, r.lent, r.granted_by
          from run r where r.org_id = came.org_id and r.run_id = one.run_id;
          return;
        end if;
      end if;
    end if;
  end if;
  return query select * from claim_all(most, worker, token, queues, slots, orgs, able, estimates, depth);
end
$$;

-- As before, by place.
create or replace function claim_urgent(queues text[], orgs integer[], able text[], depth integer)
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
    cross join lateral (
      select s.queue, s.org_id, s.weight, s.virtual_s, s.active from share s
      where s.org_id = u.org_id and s.queue = q.queue order by s.virtual_s desc limit 1
    ) s
    where s.active
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

-- As before, by place; where orgs go back, what stands first in their queues is no further than they.
create or replace function charge_shares(orgs bigint[], queues text[], seconds float8[]) returns void
  language plpgsql volatile
  set search_path = millpond, pg_temp
as $$
declare
  ahead text[];
  ahead_orgs bigint[];
begin
  perform pg_advisory_xact_lock(7741001);
  select array_agg(u.queue), array_agg(u.org_id) into ahead, ahead_orgs
  from unnest(orgs, queues, seconds) as u(org_id, queue, seconds)
  cross join lateral (select s.virtual_s from share s where s.org_id = u.org_id and s.queue = u.queue
                      order by s.virtual_s desc limit 1) s
  cross join lateral (select c.virtual_s from fair_clock c where c.queue = u.queue order by c.virtual_s desc limit 1) c
  where u.seconds < 0 and s.virtual_s >= c.virtual_s;
  update share s set virtual_s = u.virtual_s + u.seconds / u.weight
  from (
    select u.org_id, u.queue, u.seconds, s.virtual_s, s.weight from unnest(orgs, queues, seconds) as u(org_id, queue, seconds)
    cross join lateral (select s.virtual_s, s.weight from share s where s.org_id = u.org_id and s.queue = u.queue
                        order by s.virtual_s desc limit 1) s
  ) u
  where s.org_id = any(array[u.org_id]) and s.queue = any(array[u.queue]) and s.virtual_s = any(array[u.virtual_s]);
  update fair_clock c set least_s = m.virtual_s
  from (
    select u.queue, min(s.virtual_s) as virtual_s from unnest(orgs, queues, seconds) as u(org_id, queue, seconds)
    cross join lateral (select s.virtual_s from share s where s.org_id = u.org_id and s.queue = u.queue
                        order by s.virtual_s desc limit 1) s
    where u.seconds < 0 group by u.queue
  ) m
  cross join lateral (select k.virtual_s, k.least_s from fair_clock k where k.queue = m.queue order by k.virtual_s desc limit 1) k
  where c.queue = any(array[m.queue]) and c.virtual_s = any(array[k.virtual_s]) and m.virtual_s < k.least_s;
  if ahead is null then
    return;
  end if;
  update fair_clock c set virtual_s = m.virtual_s, least_s = least(k.least_s, m.virtual_s)
  from (
    select g.queue, greatest(g.virtual_s, a.virtual_s) as virtual_s
    from (
      select u.queue, max(s.virtual_s) as virtual_s from unnest(ahead_orgs, ahead) as u(org_id, queue)
      cross join lateral (select s.virtual_s from share s where s.org_id = u.org_id and s.queue = u.queue
                          order by s.virtual_s desc limit 1) s
      group by u.queue
    ) g
    left join lateral (
      select s.virtual_s from share s where s.queue = g.queue and s.active order by s.virtual_s desc limit 1
    ) a on true
  ) m
  cross join lateral (select k.virtual_s, k.least_s from fair_clock k where k.queue = m.queue order by k.virtual_s desc limit 1) k
  where c.queue = any(array[m.queue]) and c.virtual_s = any(array[k.virtual_s]) and m.virtual_s < k.virtual_s;
end
$$;
