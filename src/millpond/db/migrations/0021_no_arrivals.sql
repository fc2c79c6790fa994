-- The first half of a claim, as before, but that it makes no lanes and shares of arrivals where there are none: to begin and
-- end that statement takes longer than all it does then, and a worker that drains a backlog claims hundreds of times a second.
create or replace function claim_heads(most integer, worker uuid, queues text[], orgs integer[], able text[], depth integer)
  returns table (queue text, org_id bigint, weight float8, virtual_s float8, lane_id bigint, offset_us bigint,
                 capability text, ranks bigint[], items uuid[])
  language plpgsql volatile rows 200
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  has_pauses boolean;
  is_alive boolean;
begin
  perform pg_advisory_xact_lock(7741001);
  is_alive := exists (select from worker w where w.worker_id = claim_heads.worker);
  if not exists (select from arrival) then
    return query select '', 0::bigint, 0::float8, 0::float8, 0::bigint, is_alive::int::bigint, '', null::bigint[], null::uuid[];
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
        set active = true, cursor_rank = least(lane.cursor_rank, excluded.cursor_rank)
        where not lane.active or excluded.cursor_rank < lane.cursor_rank
    ),
    shares as (
      insert into share (org_id, queue, virtual_s, active)
      select d.org_id, d.queue, coalesce(c.virtual_s, 0), true
      from (select distinct org_id, queue from g) d left join fair_clock c on c.queue = d.queue
      on conflict (org_id, queue) do update
        set active = true, virtual_s = greatest(share.virtual_s, excluded.virtual_s)
        where not share.active
    )
    select '', 0::bigint, 0::float8, 0::float8, (select count(*) from a), is_alive::int::bigint, '', null::bigint[],
           null::uuid[];
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
  select s.queue, s.org_id, s.weight, s.virtual_s, l.lane_id, l.offset_us, l.capability, h.ranks, h.items
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
    select l.lane_id, l.offset_us, l.capability, l.cursor_rank
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
