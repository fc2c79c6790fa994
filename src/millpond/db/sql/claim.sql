-- name: heads
-- Locks, consumes arrivals and reads the heads of lanes in fair order, then interactive ones, then which limits there are (functions of the migrations).
select queue, org_id, weight, virtual_s, lane_id, offset_us, capability, ranks, items, keys
from claim_heads($1, $2, $3::text[], $4::int[], $5::text[], $6)
union all
select queue, org_id, weight, virtual_s, lane_id, offset_us, capability, ranks, items, keys
from claim_urgent($3::text[], $4::int[], $5::text[], $6)
union all
select queue, org_id, weight, virtual_s, lane_id, offset_us, capability, ranks, items, keys from claim_limits();

-- name: take
-- Moves picked ready rows to leases; stores where that leaves lanes, shares and clocks. As `claim_take` of the migrations, without a copy of each row.
with free as materialized (
  select p.org_id, p.lane_id, p.rank, p.item_id
  from unnest(string_to_array($1, chr(30))::bigint[], string_to_array($2, chr(30))::bigint[],
              string_to_array($3, chr(30))::bigint[], string_to_array($4, chr(30))::uuid[]) as p(org_id, lane_id, rank, item_id)
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
  update item i set state = 'running', token = $6::uuid, attempt = i.attempt + 1, event_no = i.event_no + 1,
                    started_at = coalesce(i.started_at, clock_timestamp())
  from gone g where i.org_id = any(array[g.org_id]) and i.item_id = any(array[g.item_id])
  returning i.org_id, i.item_id, i.run_id, i.lane_id, i.attempt, i.event_no, i.deaths, i.tries, i.cancel_requested,
            i.duties, i.kind, i.queue, i.step_key
),
l as materialized (
  select * from unnest(string_to_array($7, chr(30))::bigint[], string_to_array($8, chr(30))::bigint[],
                       string_to_array($9, chr(30))::bigint[], string_to_array($10, chr(30))::bool[])
    as u(org_id, lane_id, cursor_rank, active)
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
  select t.org_id, t.item_id, t.run_id, t.lane_id, n.queue, n.keys, $5::uuid, t.attempt, $6::uuid
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
  from unnest(string_to_array($11, chr(30))::bigint[], string_to_array($12, chr(30)),
              string_to_array($13, chr(30))::float8[], string_to_array($14, chr(30))::bool[])
    as u(org_id, queue, virtual_s, maybe_empty)
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
      select u.queue, u.clock_s, null::float8 as changed_s from unnest($15::text[], $16::float8[]) as u(queue, clock_s)
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
select t.org_id, t.item_id, t.run_id, t.attempt, $6::uuid, t.deaths, t.tries, t.cancel_requested, r.flow,
       r.version, coalesce(t.queue, r.queue), case when t.kind = 'run' then r.input end, r.subject, r.timeout_s,
       r.deadline_at, r.rerun_of is not null, t.duties, t.kind, t.step_key, r.stamp, r.permission, r.lent, r.granted_by
from taken t join run r on r.org_id = any(array[t.org_id]) and r.run_id = any(array[t.run_id]);

-- name: at_once
-- A whole claim, if all that is ready has room (function of the migrations); the first row tells how it went.
select org_id, item_id, run_id, attempt, token_now, deaths, tries, cancel_requested, flow, version, queue, input, subject,
       timeout_s, deadline_at, is_rerun, duties, kind, step_key, stamp, permission, lent, granted_by
from set_config('synchronous_commit', 'off', true),
     claim_at_once($1, $2, $3, $4::text[], $5::int[], $6::int[], $7::text[], $8::float8[], $9, $10);

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

-- name: clocks
-- How far the fair order of queues is, in virtual seconds: where an org starts that arrives now; read under the claim's lock.
select u.queue, c.virtual_s from unnest($1::text[]) as u(queue)
cross join lateral (select c.virtual_s from fair_clock c where c.queue = u.queue order by c.virtual_s desc limit 1) c;
