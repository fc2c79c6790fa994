-- A claim of one run that came alone, by a few simple statements: what a machine at rest does for each run.

-- As before; where one work item came alone, and no org has anything waiting, it goes by statements that touch its rows alone.
-- That leaves what the long way leaves: the lane empty, the org's time charged, the queue's clock where the item began. Whatever
-- is not as simple goes the long way, which finds everything as it was.
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
    select l.lane_id, coalesce(s.weight, 1) as weight, c.virtual_s as clock_s, greatest(s.virtual_s, c.virtual_s, 0) as virtual_s,
           least(l.cursor_rank, came.min_rank) as from_rank, l.cursor_rank into place
    from worker w
    left join lane l on l.org_id = came.org_id and l.lane_id = came.lane_id
    left join share s on s.org_id = came.org_id and s.queue = came.queue
    left join fair_clock c on c.queue = came.queue
    where w.worker_id = claim_at_once.worker
      and (l.lane_id is null or not l.active and l.parked_on is null)
      and not exists (select from share x where x.queue = any(claim_at_once.queues) and x.active)
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
          insert into share as s (org_id, queue, virtual_s, active)
          values (came.org_id, came.queue,
                  place.virtual_s + estimates[array_position(able, came.capability)] / place.weight, false)
          on conflict (org_id, queue) do update set virtual_s = excluded.virtual_s;
          if place.clock_s is null or place.clock_s < place.virtual_s then
            insert into fair_clock (queue, virtual_s) values (came.queue, place.virtual_s)
            on conflict (queue) do update set virtual_s = excluded.virtual_s;
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
