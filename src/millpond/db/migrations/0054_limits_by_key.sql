-- What a claim reads of limits, tokens and interactive work goes by key whatever the planner thought of tables (0044).

-- As before, but for that.
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
  join lane l on l.org_id = any(array[h.org_id]) and l.lane_id = any(array[h.lane_id]);
  return query
  select 'room', 0::bigint, (r.capability = any(able))::int::bigint, r.queue, r.capability, null::text[], r.room, r.due_us, m.tat_us
  from unnest(queues, after_us, after_room, after_able) as q(queue, due_us, room, capability)
  cross join lateral (
    select x.queue, x.capability, x.room, x.due_us from room x
    where x.queue = q.queue and x.due_us <= now_us and (x.due_us, x.room, x.capability) > (q.due_us, q.room, q.capability)
    order by x.due_us, x.room, x.capability limit page
  ) r
  left join meter m on m.room = any(array[r.room])
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
    left join meter m on m.room = any(array[r.room]);
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
    left join meter m on m.room = any(array[r.room]);
  end if;
  blocked := (select l.blocked_at from lane l where l.blocked_at is not null order by l.blocked_at limit 1);
  if blocked is null or blocked > now_at - patience_s * interval '1 second' then
    return;
  end if;
  return query
  with g as materialized (
    select distinct l.queue from lease e join lane l on l.org_id = any(array[e.org_id]) and l.lane_id = any(array[e.lane_id])
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
    where not d.is_due and lane.org_id = any(array[d.org_id]) and lane.lane_id = any(array[d.lane_id])
  )
  select 'waiting', d.org_id, d.lane_id, d.queue, d.capability, d.keys, '',
         (d.queue = any(queues) and d.capability = any(able))::int::bigint, (extract(epoch from d.blocked_at) * 1000000)::bigint
  from d
  where d.is_due and (d.has_slot or (d.queue = any(queues) and d.capability = any(able)) or exists (select from g where g.queue = d.queue))
  order by d.blocked_at;
end
$$;

-- As before, but for that; what is told is not compared with every reservation.
create or replace function claim_tokens()
  returns table (room text, capability text, delta bigint, used bigint)
  language plpgsql volatile rows 50
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
begin
  perform pg_advisory_xact_lock(7741001);
  return query
  with u as materialized (
    delete from lease_use returning org_id, item_id, token, keys, tokens, is_lost, step_key, carried
  ),
  t as materialized (
    select r.org_id, r.item_id, r.token, r.room, r.step_key, sum(u.tokens)::bigint as more,
           bool_or(u.is_lost and u.step_key is not null) as is_cut, bool_or(u.is_lost and u.step_key is null) as is_gone
    from u cross join lateral (
      select r.org_id, r.item_id, r.token, r.room, r.step_key, r.parts, r.carried from reservation r
      where r.org_id = u.org_id and r.item_id = u.item_id and r.token = u.token offset 0
    ) r
    where (u.step_key is null or r.step_key = u.step_key
           or (r.step_key = '' and not exists (
             select from reservation o where o.org_id = r.org_id and o.item_id = r.item_id and o.token = r.token
                                         and o.room = r.room and o.step_key = u.step_key offset 0)))
      -- Not here where the limit is on one provider or model, and it was another one that the work counts on too; what was
      -- asked may have a name that is nobody's key: then it is what the step counts on.
      and not exists (
        select from unnest(r.parts) p(part) where part <> all(u.keys) and (
          exists (select from unnest(r.carried || u.carried) c(key)
                  where key = any(u.keys) and split_part(key, ':', 1) = split_part(part, ':', 1))
          or (part <> all(u.carried) and exists (
            select from unnest(u.carried) c(key) where split_part(key, ':', 1) = split_part(part, ':', 1)))))
    group by r.org_id, r.item_id, r.token, r.room, r.step_key
  ),
  -- Those of which something is told, found by their keys, and all others: no product of the two.
  o as materialized (
    select r.org_id, r.item_id, r.token, r.room, r.step_key, r.capability, r.tokens, r.used, r.is_lost, t.more, t.is_cut, t.is_gone
    from t join reservation r on r.org_id = any(array[t.org_id]) and r.item_id = any(array[t.item_id])
      and r.token = any(array[t.token]) and r.room = any(array[t.room]) and r.step_key = any(array[t.step_key])
    union all
    select r.org_id, r.item_id, r.token, r.room, r.step_key, r.capability, r.tokens, r.used, r.is_lost, null, null, null
    from reservation r
    where (r.org_id, r.item_id, r.token, r.room, r.step_key) not in (select t.org_id, t.item_id, t.token, t.room, t.step_key from t)
  ),
  f as materialized (
    select r.*, greatest(r.tokens, r.used) as had, r.used + coalesce(r.more, 0) as uses,
           l.token is null or (r.step_key <> '' and h.token is null) as is_over,
           -- Of a worker that is gone nobody knows what the tries used that were under way.
           r.is_lost or coalesce(r.is_cut, false)
             or (coalesce(r.is_gone, false) and (r.step_key = '' or h.token is not null)) as is_unknown
    from o r
    left join lease l on l.org_id = any(array[r.org_id]) and l.item_id = any(array[r.item_id]) and l.token = r.token
    left join lateral (
      select h.token from step_lease h
      where r.step_key <> '' and h.org_id = r.org_id and h.item_id = any(array[r.item_id])
        and h.step_key = any(array[r.step_key]) and h.token = r.token and (h.since_us is null or h.is_untold) offset 0
    ) h on true
  ),
  s as materialized (
    select f.org_id, f.item_id, f.token, f.room, f.step_key, f.capability, f.had, f.uses, f.is_over, f.is_unknown,
           case when f.is_over and not f.is_unknown then f.uses else greatest(f.tokens, f.uses) end as has
    from f where f.is_over or f.more > 0 or f.is_unknown <> f.is_lost
  ),
  gone as (
    delete from reservation r using s
    where s.is_over and r.org_id = any(array[s.org_id]) and r.item_id = any(array[s.item_id])
      and r.token = any(array[s.token]) and r.room = any(array[s.room]) and r.step_key = any(array[s.step_key])
  ),
  more as (
    update reservation r set used = s.uses, is_lost = s.is_unknown from s
    where not s.is_over and r.org_id = any(array[s.org_id]) and r.item_id = any(array[s.item_id])
      and r.token = any(array[s.token]) and r.room = any(array[s.room]) and r.step_key = any(array[s.step_key])
  ),
  -- By an index of their own, and then by their key: those of what is due are rivals of both.
  b as materialized (
    select y.room, y.queue, y.capability
    from (select s.room from s group by s.room having sum(s.has - s.had) < 0) s
    cross join lateral (
      select x.room, x.queue, x.capability from room x
      where room_base(x.room) = any(array[s.room]) and x.room like 'tokens%' offset 0
    ) y
  ),
  due as (
    update room x set due_us = 0 from b
    where x.room = any(array[b.room]) and x.queue = any(array[b.queue]) and x.capability = any(array[b.capability])
      and x.due_us + 0 > 0 and x.due_us + 0 < 4611686018427387904
  )
  select s.room, s.capability, s.has - s.had, case when s.is_over and not s.is_unknown then s.uses end from s;
  return query
  select r.room, '', 0::bigint, null::bigint from (select distinct r.room from reservation r) r
  where exists (select from room x where room_base(x.room) = r.room and x.room like 'tokens%' offset 0);
end
$$;

-- As before, but for that; the index of active shares is no way to one that is known by its key.
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
      where s.org_id = any(array[u.org_id]) and s.queue = any(array[q.queue]) offset 0
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
