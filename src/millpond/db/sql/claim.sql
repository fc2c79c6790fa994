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
-- Moves picked ready rows to leases; stores where that leaves lanes, shares and clocks (function of the migrations).
select org_id, item_id, run_id, attempt, token_now, deaths, tries, cancel_requested, flow, version, queue, input, subject,
       timeout_s, deadline_at, is_rerun, duties, kind, step_key, stamp, permission, lent, granted_by
from claim_take(string_to_array($1, chr(30))::bigint[], string_to_array($2, chr(30))::bigint[],
                string_to_array($3, chr(30))::bigint[], string_to_array($4, chr(30))::uuid[], $5, $6,
                string_to_array($7, chr(30))::bigint[], string_to_array($8, chr(30))::bigint[],
                string_to_array($9, chr(30))::bigint[], string_to_array($10, chr(30))::bool[],
                string_to_array($11, chr(30))::bigint[], string_to_array($12, chr(30)),
                string_to_array($13, chr(30))::float8[], string_to_array($14, chr(30))::bool[], $15::text[], $16::float8[]);

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
