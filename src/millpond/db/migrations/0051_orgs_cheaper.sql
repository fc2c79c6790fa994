-- A claim costs the database less for each org whose runs it takes, and pauses are looked through by key.

-- As before; queue and keys of what was taken come from the lanes as these are moved, which were looked up once more before, and
-- compared with each work item.
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
  moved as (
    update lane set cursor_rank = l.cursor_rank, active = l.active
    from l where lane.org_id = any(array[l.org_id]) and lane.lane_id = any(array[l.lane_id])
    returning lane.org_id, lane.lane_id, lane.queue, lane.keys
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
    select * from unnest(changed_orgs, changed_queues, virtuals, maybe_empty) as u(org_id, queue, virtual_s, maybe_empty)
  ),
  shares as (
    update share set virtual_s = s.virtual_s,
      active = not s.maybe_empty or exists (
        select from lane x where x.org_id = s.org_id and x.queue = s.queue and x.active
          and (x.org_id, x.lane_id) not in (select l.org_id, l.lane_id from l where not l.active) offset 0)
    from s where share.org_id = any(array[s.org_id]) and share.queue = any(array[s.queue])
  ),
  clocks as (
    insert into fair_clock (queue, virtual_s)
    select * from unnest(clock_queues, claim_take.clocks)
    on conflict (queue) do update set virtual_s = greatest(fair_clock.virtual_s, excluded.virtual_s)
  )
  select t.org_id, t.item_id, t.run_id, t.attempt, claim_take.token, t.deaths, t.tries, t.cancel_requested, r.flow,
         r.version, coalesce(t.queue, r.queue), case when t.kind = 'run' then r.input end, r.subject, r.timeout_s,
         r.deadline_at, r.rerun_of is not null, t.duties, t.kind, t.step_key, r.stamp, r.permission, r.lent, r.granted_by
  from taken t join run r on r.org_id = any(array[t.org_id]) and r.run_id = any(array[t.run_id]);
end
$$;

-- As before; orgs whose pauses may be whole are found from the pauses on, by key, whatever the planner thinks of tables' sizes (0044).
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
      delete from arrival where ctid = any(array(select ctid from arrival limit most))
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
