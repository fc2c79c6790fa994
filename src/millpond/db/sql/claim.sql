-- name: lock
-- Makes this the one claim of the shard until commit; a statement of its own, so that what follows reads after it.
select pg_advisory_xact_lock(7741001);

-- name: consume
-- Turns arrivals into active lanes and shares; an org that was idle starts at its queue's virtual time, without credit.
with a as (
  delete from arrival where (org_id, arrival_id) in (select org_id, arrival_id from arrival limit $1)
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
select count(*) as arrivals, exists (select from worker where worker_id = $2) as is_alive from a;

-- name: read
-- Reads the orgs first in fair order, their lanes that this worker can serve, and the heads of those.
select s.queue, s.org_id, s.weight, s.virtual_s, l.lane_id, l.offset_us, l.capability, h.ranks, h.items
from unnest($1::text[], $2::int[]) as q(queue, orgs)
cross join lateral (
  select s.queue, s.org_id, s.weight, s.virtual_s
  from share s
  where s.queue = q.queue and s.active
    and exists (select from lane l
                where l.org_id = s.org_id and l.queue = s.queue and l.active and l.capability = any($3::text[]))
  order by s.virtual_s, s.org_id limit q.orgs
) s
cross join lateral (
  select l.lane_id, l.offset_us, l.capability, l.cursor_rank
  from lane l
  where l.org_id = s.org_id and l.queue = s.queue and l.active and l.capability = any($3::text[])
  order by l.cursor_rank + l.offset_us limit 64
) l
left join lateral (
  select array_agg(r.rank order by r.rank, r.item_id) as ranks, array_agg(r.item_id order by r.rank, r.item_id) as items
  from (select r.rank, r.item_id from ready r
        where r.org_id = s.org_id and r.lane_id = l.lane_id and r.rank >= l.cursor_rank
        order by r.rank, r.item_id limit $4) r
) h on true;

-- name: take
-- Moves picked ready rows to leases; a row whose item is locked or changed is left, only rows returned are executed.
-- Steps in other queues tell of their start themselves: the live row of their run is not to be locked here.
with free as materialized (
  select p.org_id, p.lane_id, p.rank, p.item_id
  from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::uuid[]) as p(org_id, lane_id, rank, item_id)
  cross join lateral (
    select from item i where i.org_id = p.org_id and i.item_id = p.item_id
      and i.state = 'queued' and i.rank = p.rank and i.lane_id = p.lane_id
    for update skip locked
  ) i
),
gone as (
  delete from ready r using free f
  where r.org_id = f.org_id and r.lane_id = f.lane_id and r.rank = f.rank and r.item_id = f.item_id
  returning r.org_id, r.item_id
),
taken as (
  update item i set state = 'running', token = $6, attempt = i.attempt + 1, event_no = i.event_no + 1,
                    started_at = coalesce(i.started_at, clock_timestamp())
  from gone g where i.org_id = g.org_id and i.item_id = g.item_id
  returning i.org_id, i.item_id, i.run_id, i.lane_id, i.attempt, i.event_no, i.deaths, i.tries, i.cancel_requested,
            i.kind, i.queue, i.step_key
),
leases as (
  insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)
  select t.org_id, t.item_id, t.run_id, t.lane_id, l.queue, l.keys, $5, t.attempt, $6
  from taken t join lane l on l.org_id = t.org_id and l.lane_id = t.lane_id
),
events as (
  insert into event (org_id, run_id, event_no, kind, data)
  select org_id, run_id, event_no, case when attempt = 1 then 'run.started' else 'run.resumed' end,
         json_build_object('attempt', attempt)
  from taken where kind = 'run'
)
select t.org_id, t.item_id, t.run_id, t.attempt, $6::uuid, t.deaths, t.tries, t.cancel_requested,
       r.flow, r.version, coalesce(t.queue, r.queue), case when t.kind = 'run' then r.input end, r.subject, r.timeout_s,
       t.kind, t.step_key
from taken t join run r on r.org_id = t.org_id and r.run_id = t.run_id;

-- name: settle
-- Stores how far each lane was claimed and each org's virtual time; switches off lanes and shares found empty.
with l as materialized (
  select * from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bool[]) as u(org_id, lane_id, cursor_rank, active)
),
lanes as (
  update lane set cursor_rank = l.cursor_rank, active = l.active
  from l where lane.org_id = l.org_id and lane.lane_id = l.lane_id
),
s as materialized (
  select * from unnest($5::bigint[], $6::text[], $7::float8[], $8::bool[]) as u(org_id, queue, virtual_s, maybe_empty)
),
shares as (
  update share set virtual_s = s.virtual_s,
    active = not s.maybe_empty or exists (
      select from lane x where x.org_id = s.org_id and x.queue = s.queue and x.active
        and not exists (select from l where l.org_id = x.org_id and l.lane_id = x.lane_id and not l.active))
  from s where share.org_id = s.org_id and share.queue = s.queue
)
insert into fair_clock (queue, virtual_s)
select * from unnest($9::text[], $10::float8[])
on conflict (queue) do update set virtual_s = greatest(fair_clock.virtual_s, excluded.virtual_s);

-- name: step_back
-- Lets a lane be read again from a work item that could not be taken.
update lane set cursor_rank = least(lane.cursor_rank, u.rank), active = true
from (select org_id, lane_id, min(rank) as rank
      from unnest($1::bigint[], $2::bigint[], $3::bigint[]) as u(org_id, lane_id, rank)
      group by org_id, lane_id) u
where lane.org_id = u.org_id and lane.lane_id = u.lane_id;

-- name: wake_shares
-- Puts orgs back into the fair order of their queues.
update share set active = true
from unnest($1::bigint[], $2::bigint[]) as u(org_id, lane_id)
join lane l on l.org_id = u.org_id and l.lane_id = u.lane_id
where share.org_id = l.org_id and share.queue = l.queue and not share.active;
