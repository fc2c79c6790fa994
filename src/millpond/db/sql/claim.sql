-- name: heads
-- Locks, consumes arrivals and reads the heads of lanes in fair order (function of the migrations, a statement each).
select queue, org_id, weight, virtual_s, lane_id, offset_us, capability, ranks, items, keys
from claim_heads($1, $2, $3::text[], $4::int[], $5::text[], $6);

-- name: take
-- Moves picked ready rows to leases (a row whose item is locked or changed is left); stores where that leaves lanes and shares.
with free as materialized (
  select p.org_id, p.lane_id, p.rank, p.item_id
  from unnest(string_to_array($1, chr(30))::bigint[], string_to_array($2, chr(30))::bigint[],
              string_to_array($3, chr(30))::bigint[], string_to_array($4, chr(30))::uuid[])
    as p(org_id, lane_id, rank, item_id)
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
  returning i.org_id, i.item_id, i.run_id, i.lane_id, i.attempt, i.event_no, i.deaths, i.tries, i.cancel_requested, i.duties,
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
  -- Steps in other queues tell of their start themselves: the live row of their run is not to be locked here.
  from taken where kind = 'run'
),
l as materialized (
  select * from unnest($7::bigint[], $8::bigint[], $9::bigint[], $10::bool[]) as u(org_id, lane_id, cursor_rank, active)
),
lanes as (
  update lane set cursor_rank = l.cursor_rank, active = l.active
  from l where lane.org_id = l.org_id and lane.lane_id = l.lane_id
),
s as materialized (
  select * from unnest($11::bigint[], $12::text[], $13::float8[], $14::bool[]) as u(org_id, queue, virtual_s, maybe_empty)
),
shares as (
  update share set virtual_s = s.virtual_s,
    active = not s.maybe_empty or exists (
      select from lane x where x.org_id = s.org_id and x.queue = s.queue and x.active
        and not exists (select from l where l.org_id = x.org_id and l.lane_id = x.lane_id and not l.active))
  from s where share.org_id = s.org_id and share.queue = s.queue
),
clocks as (
  insert into fair_clock (queue, virtual_s)
  select * from unnest($15::text[], $16::float8[])
  on conflict (queue) do update set virtual_s = greatest(fair_clock.virtual_s, excluded.virtual_s)
)
select t.org_id, t.item_id, t.run_id, t.attempt, $6::uuid, t.deaths, t.tries, t.cancel_requested,
       r.flow, r.version, coalesce(t.queue, r.queue), case when t.kind = 'run' then r.input end, r.subject, r.timeout_s,
       r.deadline_at, r.rerun_of is not null, t.duties, t.kind, t.step_key, r.stamp, r.permission, r.lent, r.granted_by
from taken t join run r on r.org_id = t.org_id and r.run_id = t.run_id;

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
