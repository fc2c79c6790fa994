-- Which limits there are is asked after work has been read, not before: a limit that was stored before a run came holds for that run.
--
-- Between the two, a limit could be set and a run come that was claimed as if there were none. And a run that came alone is
-- claimed by statements that are simpler still: one that joins five tables took the database longer than five that read one each.

drop function claim_at_once(integer, uuid, uuid, text[], integer[], integer[], text[], float8[], integer);
drop function claim_all(integer, uuid, uuid, text[], integer[], integer[], text[], float8[], integer);

-- The last row of a claim's heads: how often limits had been changed (org_id).
create function claim_limits()
  returns table (queue text, org_id bigint, weight float8, virtual_s float8, lane_id bigint, offset_us bigint,
                 capability text, ranks bigint[], items uuid[], keys text[])
  language plpgsql volatile rows 1
  set search_path = millpond, pg_temp
as $$
begin
  return query select '', coalesce((select v.version from limit_version v), 0), 0::float8, 0::float8, 0::bigint, 0::bigint, '',
                      null::bigint[], null::uuid[], null::text[];
end
$$;

-- As before, of limits that are as `known` still: else nothing is taken.
create function claim_all(most integer, worker uuid, token uuid, queues text[], slots integer[], orgs integer[],
                              able text[], estimates float8[], depth integer, known bigint)
  returns table (org_id bigint, item_id uuid, run_id uuid, attempt integer, token_now uuid, deaths smallint, tries smallint,
                 cancel_requested boolean, flow text, version integer, queue text, input json, subject text,
                 timeout_s float8, deadline_at timestamptz, is_rerun boolean, duties smallint, kind text, step_key text,
                 stamp integer, permission text, lent uuid, granted_by text)
  language plpgsql volatile rows 10
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  h record;
  arrivals bigint;
  n integer;
  is_whole boolean := true;
  is_empty boolean := true;
  picked_orgs bigint[] := '{}';
  picked_lanes bigint[] := '{}';
  picked_ranks bigint[] := '{}';
  picked_items uuid[] := '{}';
  lane_queues text[] := '{}';
  lane_orgs bigint[] := '{}';
  lane_ids bigint[] := '{}';
  lane_counts integer[] := '{}';
  lane_lasts bigint[] := '{}';
  lane_estimates float8[] := '{}';
  lane_weights float8[] := '{}';
  lane_virtuals float8[] := '{}';
  share_orgs bigint[];
  share_queues text[];
  share_virtuals float8[];
  clock_queues text[];
  clocks float8[];
begin
  for h in select * from claim_heads(most, worker, queues, orgs, able, depth) loop
    if h.queue = '' then
      arrivals := h.lane_id;
      if h.offset_us = 0 then
        return query select arrivals, null::uuid, null::uuid, -1, null::uuid, null::smallint, null::smallint, null::boolean, null,
          null::int, null, null::json, null, null::float8, null::timestamptz, null::boolean, null::smallint, null, null,
          null::int, null, null::uuid, null;
        return;
      end if;
      continue;
    end if;
    n := coalesce(cardinality(h.items), 0);
    is_whole := is_whole and n < depth;
    is_empty := false;
    picked_orgs := picked_orgs || array_fill(h.org_id, array[n]);
    picked_lanes := picked_lanes || array_fill(h.lane_id, array[n]);
    picked_ranks := picked_ranks || h.ranks;
    picked_items := picked_items || h.items;
    lane_queues := lane_queues || h.queue;
    lane_orgs := lane_orgs || h.org_id;
    lane_ids := lane_ids || h.lane_id;
    lane_counts := lane_counts || n;
    lane_lasts := lane_lasts || coalesce(h.ranks[n] + h.offset_us, 0);
    lane_estimates := lane_estimates || estimates[array_position(able, h.capability)];
    lane_weights := lane_weights || h.weight;
    lane_virtuals := lane_virtuals || h.virtual_s;
  end loop;
  n := 1;
  if not is_whole
    or exists (select from room) or coalesce((select v.version from limit_version v), 0) is distinct from known
    or exists (select from unnest(lane_queues, lane_counts) as l(queue, n) join unnest(queues, slots) as q(queue, slots)
             on q.queue = l.queue group by q.queue, q.slots having sum(l.n) > q.slots)
    or cardinality(picked_items) <> (
      select count(*) from unnest(picked_orgs, picked_lanes, picked_ranks, picked_items) as p(org_id, lane_id, rank, item_id)
      cross join lateral (
        select from item i where i.org_id = p.org_id and i.item_id = p.item_id
          and i.state = 'queued' and i.rank = p.rank and i.lane_id = p.lane_id
        for update skip locked) i)
  then
    n := 0;
  elsif not is_empty and cardinality(picked_items) = 0 then
    n := 2;
  end if;
  return query select arrivals, null::uuid, null::uuid, n, null::uuid, null::smallint, null::smallint, null::boolean, null,
    null::int, null, null::json, null, null::float8, null::timestamptz, null::boolean, null::smallint, null, null, null::int,
    null, null::uuid, null;
  if n = 0 or is_empty then
    return;
  end if;
  select array_agg(s.org_id), array_agg(s.queue), array_agg(s.virtual_s) into share_orgs, share_queues, share_virtuals
  from (
    select l.org_id, l.queue, min(l.virtual_s) + sum(l.n * l.estimate_s / l.weight) as virtual_s
    from unnest(lane_queues, lane_orgs, lane_counts, lane_estimates, lane_weights, lane_virtuals)
      as l(queue, org_id, n, estimate_s, weight, virtual_s)
    group by l.org_id, l.queue
  ) s;
  -- The clock of a queue is the virtual start of the last item that goes.
  select array_agg(c.queue), array_agg(c.virtual_s) into clock_queues, clocks
  from (
    select s.queue, max(s.virtual_s - s.last_s) as virtual_s
    from (
      select l.org_id, l.queue, min(l.virtual_s) + sum(l.n * l.estimate_s / l.weight) as virtual_s,
             (array_agg(l.estimate_s / l.weight order by l.last desc))[1] as last_s
      from unnest(lane_queues, lane_orgs, lane_counts, lane_lasts, lane_estimates, lane_weights, lane_virtuals)
        as l(queue, org_id, n, last, estimate_s, weight, virtual_s)
      where l.n > 0 group by l.org_id, l.queue
    ) s
    group by s.queue
  ) c;
  return query
  -- Every lane is empty then, and has the highest rank, since its next arrival brings its own.
  select * from claim_take(picked_orgs, picked_lanes, picked_ranks, picked_items, worker, token, lane_orgs, lane_ids,
    array_fill(4611686018427387904, array[cardinality(lane_ids)]), array_fill(false, array[cardinality(lane_ids)]),
    share_orgs, share_queues, share_virtuals, array_fill(true, array[cardinality(share_orgs)]),
    coalesce(clock_queues, '{}'), coalesce(clocks, '{}'));
end
$$;

-- As before, so too.
create function claim_at_once(most integer, worker uuid, token uuid, queues text[], slots integer[], orgs integer[],
                              able text[], estimates float8[], depth integer, known bigint)
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
  arrived integer := 0;
  is_alone boolean := false;
  one record;
  came record;
  place record;
  stood record;
  clock record;
  head record;
  gate record;
  begins_s float8;
  is_free boolean;
begin
  perform pg_advisory_xact_lock(7741001);
  for one in
    select v.org_id, v.arrival_id, v.lane_id, v.queue, v.capability, v.keys, v.offset_us, v.min_rank from arrival v limit 2
  loop
    came := one;
    arrived := arrived + 1;
  end loop;
  if arrived = 1 then
    is_alone := came.queue = any(queues) and came.capability = any(able) and most > 0 and depth > 1
      and slots[array_position(queues, came.queue)] > 0;
  end if;
  if is_alone then
    select l.cursor_rank, l.active or l.parked_on is not null as is_met into place
    from lane l where l.org_id = came.org_id and l.lane_id = came.lane_id;
    if place.is_met is not true then
      select s.weight, s.virtual_s into stood from share s where s.org_id = came.org_id and s.queue = came.queue
      order by s.virtual_s desc limit 1;
      select c.virtual_s, c.least_s into clock from fair_clock c where c.queue = came.queue order by c.virtual_s desc limit 1;
      begins_s := greatest(stood.virtual_s, clock.virtual_s, 0);
      perform from share x where x.queue = came.queue and x.active and x.virtual_s >= coalesce(clock.least_s, '-infinity') limit 1;
      is_free := not found;
      if is_free and cardinality(queues) > 1 then
        perform from unnest(queues) as q(queue) cross join lateral (
          select from share x where x.queue = q.queue and x.active
            and x.virtual_s >= coalesce((select k.least_s from fair_clock k where k.queue = q.queue order by k.virtual_s desc limit 1),
                                        '-infinity') limit 1
        ) x;
        is_free := not found;
      end if;
      if is_free then
        select array_agg(h.rank) as ranks, array_agg(h.item_id) as items into head
        from (select r.rank, r.item_id from ready r
              where r.org_id = came.org_id and r.lane_id = came.lane_id and r.rank >= least(place.cursor_rank, came.min_rank)
              order by r.rank, r.item_id limit 2) h;
        -- Only now: what is read after them holds for whatever came before.
        select exists (select from worker w where w.worker_id = claim_at_once.worker) as is_alive,
               exists (select from room) or coalesce((select v.version from limit_version v), 0) is distinct from known as is_limited,
               exists (select from pause) or exists (select from queue_pause) as has_pauses
        into gate;
        if gate.is_alive and cardinality(head.items) = 1 and not gate.is_limited and not gate.has_pauses then
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
            if place.cursor_rank is null then
              insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)
              values (came.org_id, came.lane_id, came.queue, came.capability, came.keys, came.offset_us, empty_rank, false);
            elsif place.cursor_rank <> empty_rank then
              update lane l set cursor_rank = empty_rank where l.org_id = came.org_id and l.lane_id = came.lane_id;
            end if;
            if stood.virtual_s is null then
              insert into share (org_id, queue, virtual_s, active)
              values (came.org_id, came.queue, begins_s + estimates[array_position(able, came.capability)], false);
            else
              update share s set virtual_s = begins_s + estimates[array_position(able, came.capability)] / stood.weight
              where s.org_id = came.org_id and s.queue = came.queue and s.virtual_s = stood.virtual_s;
            end if;
            -- Nobody waits in this queue: who does next begins at its clock.
            if clock.virtual_s is null then
              insert into fair_clock (queue, virtual_s, least_s) values (came.queue, begins_s, begins_s);
            elsif clock.virtual_s < begins_s then
              update fair_clock c set virtual_s = begins_s, least_s = begins_s
              where c.queue = came.queue and c.virtual_s = clock.virtual_s;
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
  end if;
  return query select * from claim_all(most, worker, token, queues, slots, orgs, able, estimates, depth, known);
end
$$;
