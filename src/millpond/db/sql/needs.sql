-- Steps that need keys: room for their tries, and their lines.

-- name: riders
-- Which steps ask under leases that hold, what their runs count on, and how they stand: with room, in everybody's sight, in line before.
select u.ord, n.queue, n.capability, n.keys, n.offset_us, greatest(h.virtual_s, c.virtual_s, 0) as virtual_s,
       s.token is not null and s.since_us is null and s.keys <> '{}' as has_room, s.since_us is not null as is_seen, x.rank,
       case when x.rank is not null and not exists (
         select from lane m
         cross join lateral (
           select from ready r
           where r.org_id = m.org_id and r.lane_id = m.lane_id and r.rank >= m.cursor_rank and r.rank < x.rank limit 1) r
         where m.org_id = x.org_id and m.lane_id = x.lane_id offset 0) then x.lane_id end as heads
from unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[]) with ordinality as u(org_id, item_id, token, step_key, ord)
join lease l on l.org_id = any(array[u.org_id]) and l.item_id = any(array[u.item_id]) and l.token = u.token
join lane n on n.org_id = any(array[l.org_id]) and n.lane_id = any(array[l.lane_id])
left join lateral (select h.virtual_s from share h where h.org_id = n.org_id and h.queue = n.queue
                   order by h.virtual_s desc limit 1) h on true
left join lateral (select c.virtual_s from fair_clock c where c.queue = n.queue order by c.virtual_s desc limit 1) c on true
left join step_lease s on s.org_id = any(array[u.org_id]) and s.item_id = any(array[u.item_id]) and s.step_key = any(array[u.step_key])
  and s.token = u.token
left join step_need x on x.org_id = any(array[u.org_id]) and x.run_id = any(array[u.item_id]) and x.step_key = any(array[u.step_key])
order by u.ord;

-- name: elders
-- Lanes under rooms that a live worker with a free slot could let go, with their first items and others' slots; the first 64 of each room.
with l as materialized (
  select l.* from unnest($1::text[]) as u(room)
  cross join lateral (
    (select u.room, a.org_id, a.lane_id, a.queue, a.capability, a.keys, a.offset_us, a.cursor_rank from lane a
     where a.parked_on = u.room and a.active limit 64)
    union all
    (select u.room, p.org_id, p.lane_id, p.queue, p.capability, p.keys, p.offset_us, p.cursor_rank from lane p
     where p.parked_on = u.room and not p.active limit 64)
  ) l
),
w as materialized (
  -- Once for all lanes of a queue that the same workers can take.
  select o.queue, o.capability, w.slots
  from (select distinct l.queue, l.capability from l) o
  cross join lateral (
    select coalesce(sum((k.queues->>o.queue)::int - coalesce((k.in_use->>o.queue)::int, 0))
                    filter (where k.worker_id <> $2 and (k.queues->>o.queue)::int > coalesce((k.in_use->>o.queue)::int, 0)), 0) as slots,
           coalesce(bool_or(k.worker_id = $2), false) and o.queue = any($3::text[]) as is_mine
    from worker k
    where k.expires_at > clock_timestamp() and not k.draining and rtrim(o.capability, '!') = any(k.capabilities)
  ) w
  where w.slots > 0 or w.is_mine
)
select l.room, l.org_id, l.lane_id, l.queue, l.offset_us, greatest(h.virtual_s, c.virtual_s, 0) as virtual_s, w.slots,
       array(select r.rank from ready r where r.org_id = l.org_id and r.lane_id = l.lane_id and r.rank >= l.cursor_rank
             order by r.rank limit $4) as ranks,
       l.capability, coalesce(h.weight, 1) as weight, l.keys
from l join w on w.queue = l.queue and w.capability = l.capability
left join lateral (select h.virtual_s, h.weight from share h where h.org_id = l.org_id and h.queue = l.queue
                   order by h.virtual_s desc limit 1) h on true
left join lateral (select c.virtual_s from fair_clock c where c.queue = l.queue order by c.virtual_s desc limit 1) c on true
where not exists (select from queue_pause z where z.queue = l.queue)
  and not exists (select from pause z where z.org_id = l.org_id and z.queue in ('', l.queue)
                                        and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')));

-- name: holders
-- The workers that have these runs.
select distinct l.worker_id from unnest($1::bigint[], $2::uuid[]) as u(org_id, item_id)
join lease l on l.org_id = u.org_id and l.item_id = u.item_id;

-- name: elders_of_tokens
-- As `elders`, under limits on tokens: those whose need is left there, and what each of their items takes; the first 64 of each of the 32 smallest needs.
with l as materialized (
  select l.* from unnest($1::text[], $5::bigint[]) as u(room, tokens_left)
  cross join lateral (
    select distinct x.room as stand, n.need
    from room x cross join lateral (select substring(x.room from '^tokens[:~]([0-9]+) ')::bigint as need) n
    where room_base(x.room) = u.room and x.room like 'tokens%' and n.need <= u.tokens_left
    order by n.need, x.room limit 32
  ) x
  cross join lateral (
    (select u.room, x.need, a.org_id, a.lane_id, a.queue, a.capability, a.offset_us, a.cursor_rank from lane a
     where a.parked_on = x.stand and a.active limit 64)
    union all
    (select u.room, x.need, p.org_id, p.lane_id, p.queue, p.capability, p.offset_us, p.cursor_rank from lane p
     where p.parked_on = x.stand and not p.active limit 64)
  ) l
),
w as materialized (
  -- Once for all lanes of a queue that the same workers can take.
  select o.queue, o.capability, w.slots
  from (select distinct l.queue, l.capability from l) o
  cross join lateral (
    select coalesce(sum((k.queues->>o.queue)::int - coalesce((k.in_use->>o.queue)::int, 0))
                    filter (where k.worker_id <> $2 and (k.queues->>o.queue)::int > coalesce((k.in_use->>o.queue)::int, 0)), 0) as slots,
           coalesce(bool_or(k.worker_id = $2), false) and o.queue = any($3::text[]) as is_mine
    from worker k
    where k.expires_at > clock_timestamp() and not k.draining and rtrim(o.capability, '!') = any(k.capabilities)
  ) w
  where w.slots > 0 or w.is_mine
)
select l.room, l.org_id, l.lane_id, l.queue, l.offset_us, greatest(h.virtual_s, c.virtual_s, 0) as virtual_s, w.slots,
       array(select r.rank from ready r where r.org_id = l.org_id and r.lane_id = l.lane_id and r.rank >= l.cursor_rank
             order by r.rank limit $4) as ranks, l.need
from l join w on w.queue = l.queue and w.capability = l.capability
left join lateral (select h.virtual_s, h.weight from share h where h.org_id = l.org_id and h.queue = l.queue
                   order by h.virtual_s desc limit 1) h on true
left join lateral (select c.virtual_s from fair_clock c where c.queue = l.queue order by c.virtual_s desc limit 1) c on true
where not exists (select from queue_pause z where z.queue = l.queue)
  and not exists (select from pause z where z.org_id = l.org_id and z.queue in ('', l.queue)
                                        and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')));

-- name: seat
-- Gives steps room for a try under leases that hold, on disk before it begins, and takes them out of their lines; tells which.
with d as (select set_config('synchronous_commit', 'on', true)),
u as materialized (
  -- A lease that is just being given back is left: its run may have put the step into its line since.
  select u.* from d, unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[], $5::text[])
    with ordinality as u(org_id, item_id, token, step_key, keys, ord)
  cross join lateral (
    select from lease l where l.org_id = u.org_id and l.item_id = u.item_id and l.token = u.token for update skip locked
  ) l
),
s as (
  insert into step_lease (org_id, item_id, step_key, token, keys)
  select org_id, item_id, step_key, token, string_to_array(keys, chr(31)) from u
  on conflict (org_id, item_id, step_key) do update
    set token = excluded.token, keys = excluded.keys, since_us = null, taken_at = clock_timestamp(),
        is_untold = step_lease.is_untold and step_lease.token = excluded.token
),
n as materialized (
  select n.* from u cross join lateral (
    select x.org_id, x.run_id, x.step_key, x.need_id, x.lane_id, x.rank from step_need x
    where x.org_id = u.org_id and x.run_id = u.item_id and x.step_key = u.step_key for update skip locked
  ) n
),
gone as (
  delete from step_need x using n where x.org_id = any(array[n.org_id]) and x.run_id = any(array[n.run_id])
    and x.step_key = any(array[n.step_key])
),
unlined as (
  delete from ready r using n
  where r.org_id = any(array[n.org_id]) and r.lane_id = any(array[n.lane_id]) and r.rank = any(array[n.rank])
    and r.item_id = any(array[n.need_id])
)
select ord from u;

-- name: ask
-- Lets every claim see steps that wait beside other branches of their runs, under leases that hold: they stand in line from then on.
insert into step_lease (org_id, item_id, step_key, token, keys, since_us)
select u.org_id, u.item_id, u.step_key, u.token, string_to_array(u.keys, chr(31)), u.since_us
from unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::bigint[]) as u(org_id, item_id, token, step_key, keys, since_us)
cross join lateral (
  -- As for `seat`: who holds it has locked it, and the next claim asks again.
  select from lease l where l.org_id = u.org_id and l.item_id = u.item_id and l.token = u.token for update skip locked
) l
on conflict (org_id, item_id, step_key) do update
  set token = excluded.token, keys = excluded.keys, since_us = excluded.since_us,
      is_untold = step_lease.is_untold and step_lease.token = excluded.token
  where step_lease.token <> excluded.token or step_lease.keys = '{}';

-- name: call
-- Readies waiting runs in their own lanes for picked steps of theirs; a step that waits no more leaves its line. Locked runs are left.
with p as materialized (
  select u.*, s.run_id, s.step_key, s.keys
  from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::uuid[]) with ordinality as u(org_id, lane_id, rank, need_id, ord)
  left join lateral (
    select s.run_id, s.step_key, s.keys from step_need s
    where s.org_id = u.org_id and s.need_id = u.need_id and s.lane_id = u.lane_id and s.rank = u.rank offset 0
  ) s on true
),
t as materialized (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as us),
f as materialized (
  select p.*, i.base, i.can_go
  from p cross join lateral (
    select i.lane_id | 1 as base, i.state in ('waiting', 'awaiting_input') and i.blocked is null as can_go from item i
    where i.org_id = p.org_id and i.item_id = p.run_id for update skip locked
  ) i
),
n as materialized (
  -- What was read before the lock may be over by now.
  select f.* from f cross join lateral (
    select from step_need s
    where s.org_id = f.org_id and s.run_id = f.run_id and s.step_key = f.step_key and s.need_id = f.need_id offset 0
  ) s
  where f.can_go
),
unlined as (
  delete from ready r
  using (select org_id, lane_id, rank, need_id from f
         union all
         select p.org_id, p.lane_id, p.rank, p.need_id from p
         where p.run_id is null or not exists (
           select from item i where i.org_id = p.org_id and i.item_id = p.run_id offset 0)) x
  where r.org_id = any(array[x.org_id]) and r.lane_id = any(array[x.lane_id]) and r.rank = any(array[x.rank])
    and r.item_id = any(array[x.need_id])
),
over as (
  delete from step_need s using n where s.org_id = any(array[n.org_id]) and s.run_id = any(array[n.run_id])
    and s.step_key = any(array[n.step_key])
),
i as (
  update item i set state = 'queued', lane_id = n.base, rank = t.us
  from (select distinct org_id, run_id, base from n) n, t
  where i.org_id = any(array[n.org_id]) and i.item_id = any(array[n.run_id])
  returning i.org_id, i.item_id, i.lane_id, i.rank
),
q as (
  insert into ready (org_id, lane_id, rank, item_id) select org_id, lane_id, rank, item_id from i
),
lanes as (
  insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)
  select distinct on (i.org_id, i.lane_id) i.org_id, i.lane_id, r.queue,
         r.flow || '@' || r.version || case when i.lane_id & 2 = 2 then $7 else '' end, r.keys,
         -r.priority * $5::bigint - $6::bigint - (r.urgency is not null)::int, 4611686018427387904, false
  from i join run r on r.org_id = any(array[i.org_id]) and r.run_id = any(array[i.item_id])
  on conflict (org_id, lane_id) do nothing
)
select n.ord, n.org_id, n.run_id, n.need_id, n.step_key, array_to_string(n.keys, chr(31)) as keys, n.rank as since_us, i.lane_id, i.rank
from n join i on i.org_id = n.org_id and i.item_id = n.run_id order by n.ord;

-- name: run
-- What the lanes of a run's steps are made of.
select queue, flow, version, keys, priority, coalesce(urgency, 'standard') as urgency from run where org_id = $1 and run_id = $2;

-- name: stand
-- Puts steps of a locked run into their lines, where they have stood since they first had no room; its other steps leave theirs.
with t as materialized (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as us),
u as materialized (
  select u.*, string_to_array(u.key_text, chr(31)) as keys, string_to_array(u.lane_text, chr(31)) as lane_keys
  from unnest($3::text[], $4::text[], $5::bigint[], $6::text[], $7::bigint[], $11::uuid[]) with ordinality
    as u(step_key, key_text, lane_id, lane_text, since_us, need_id, ord)
),
old as (
  delete from step_need s where s.org_id = $1 and s.run_id = $2 and s.step_key <> all($3::text[])
  returning s.org_id, s.lane_id, s.rank, s.need_id
),
unlined as (
  delete from ready r using old
  where r.org_id = any(array[old.org_id]) and r.lane_id = any(array[old.lane_id]) and r.rank = any(array[old.rank])
    and r.item_id = any(array[old.need_id])
),
unseen as (
  -- Under its lease, which is given back, they stood beside working branches.
  delete from step_lease y where y.org_id = $1 and y.item_id = $2 and y.since_us is not null
),
s as (
  insert into step_need as s (org_id, run_id, step_key, need_id, lane_id, rank, keys)
  select $1, $2, u.step_key, u.need_id, u.lane_id, least(t.us, coalesce(u.since_us, t.us)) + u.ord, u.keys from u, t
  on conflict (org_id, run_id, step_key) do update
    set lane_id = excluded.lane_id, keys = excluded.keys, rank = least(s.rank, excluded.rank)
  returning s.step_key, s.need_id, s.lane_id, s.rank
),
q as (
  insert into ready (org_id, lane_id, rank, item_id) select $1, s.lane_id, s.rank, s.need_id from s
  on conflict do nothing
)
insert into arrival (org_id, lane_id, queue, capability, keys, offset_us, min_rank)
select $1, s.lane_id, $8, $9, u.lane_keys, $10, s.rank from s join u on u.step_key = s.step_key;

-- name: leave
-- Gives back the room of tries under these leases; the others keep theirs.
delete from step_lease s using unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[]) as u(org_id, item_id, token, step_key)
where s.org_id = any(array[u.org_id]) and s.item_id = any(array[u.item_id]) and s.token = u.token
  and s.step_key = any(array[u.step_key]);

-- name: give_up
-- Gives back the room of a try of which nothing was recorded, under a lease that holds; where it, or one before it, used what was not told yet ($5), what it has reserved stays until the lease ends.
with l as materialized (select from lease where org_id = $1 and item_id = $2 and token = $3 for key share),
gone as (
  delete from step_lease s using l
  where s.org_id = $1 and s.item_id = $2 and s.token = $3 and s.step_key = $4 and not ($5::bool or s.is_untold)
)
update step_lease s set keys = '{}', since_us = null, is_untold = true from l
where s.org_id = $1 and s.item_id = $2 and s.token = $3 and s.step_key = $4 and ($5::bool or s.is_untold);

-- name: drop_ghosts
-- Takes steps out of the line for which nobody waits any more, under leases of this worker; rows that somebody holds are left.
with g as materialized (
  select s.org_id, s.item_id, s.step_key
  from unnest($1::bigint[], $2::uuid[], $3::text[]) as u(org_id, item_id, step_key)
  join lease l on l.org_id = any(array[u.org_id]) and l.item_id = any(array[u.item_id]) and l.worker_id = $4
  cross join lateral (
    select s.org_id, s.item_id, s.step_key from step_lease s
    where s.org_id = u.org_id and s.item_id = u.item_id and s.step_key = u.step_key and s.token = l.token
      and s.since_us is not null
    for update skip locked) s
)
delete from step_lease s using g
where s.org_id = any(array[g.org_id]) and s.item_id = any(array[g.item_id]) and s.step_key = any(array[g.step_key]);

-- name: end_lines
-- Takes the steps of ended runs out of their lines.
with n as (
  delete from step_need s using unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
  where s.org_id = any(array[u.org_id]) and s.run_id = any(array[u.run_id])
  returning s.org_id, s.need_id, s.lane_id, s.rank
)
delete from ready r using n where r.org_id = any(array[n.org_id]) and r.lane_id = any(array[n.lane_id])
  and r.rank = any(array[n.rank]) and r.item_id = any(array[n.need_id]);

-- name: sweep_lines
-- Deletes steps that stand in line for runs that are over.
with n as (
  delete from step_need where (org_id, run_id, step_key) in (
    select s.org_id, s.run_id, s.step_key from step_need s
    where not exists (select from item i where i.org_id = s.org_id and i.item_id = s.run_id)
    limit 1000 for update skip locked)
  returning org_id, lane_id, rank, need_id
)
delete from ready r using n where r.org_id = n.org_id and r.lane_id = n.lane_id and r.rank = n.rank and r.item_id = n.need_id;

-- name: sweep
-- Deletes room that counts no more, since its lease is gone; a claim settles what it has reserved of tokens before that.
delete from step_lease where (org_id, item_id, step_key) in (
  select s.org_id, s.item_id, s.step_key from step_lease s
  where not exists (select from lease e where e.org_id = s.org_id and e.item_id = s.item_id and e.token = s.token)
    and not exists (select from reservation r where r.org_id = s.org_id and r.item_id = s.item_id and r.token = s.token
                                                and r.step_key = s.step_key)
  limit 1000 for update skip locked);

-- name: waiting
-- The steps of a waiting run that stand in line for room, in the order in which they began to.
select s.step_key, s.need_id, s.keys, s.lane_id, s.rank, r.queue, r.flow, r.version, coalesce(r.urgency, 'standard') as urgency
from step_need s join run r on r.org_id = any(array[s.org_id]) and r.run_id = any(array[s.run_id])
where s.org_id = $1 and s.run_id = $2 order by s.rank, s.step_key limit 200;
