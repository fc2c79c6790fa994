-- name: page
-- Runs of an org that have ended, newest first: when they were ready at first, began, how long workers had them, what they used.
select r.run_id, r.flow, r.version, r.queue, r.keys, r.priority, coalesce(r.urgency, 'standard') as urgency,
       run_ready_at(r.org_id, r.run_id, r.created_at) as ready_at, r.started_at,
       case when r.attempts = 1 then extract(epoch from r.finished_at - r.started_at)::float8
            else run_worked_s(r.org_id, r.run_id, r.finished_at) end as worked_s,
       case when r.tells_use then run_used(r.org_id, r.run_id, r.keys) end as used
from run r
where r.org_id = $1 and r.run_id < $2 and r.run_id >= $3 and ($4::text is null or r.queue = $4)
  and r.outcome is not null and r.started_at is not null
order by r.run_id desc limit $5;

-- name: page_of_all
-- The same of all orgs, by org and run, for a transaction without an org (function of the migrations).
select org_id, run_id, org, flow, version, queue, keys, priority, urgency, ready_at, started_at, worked_s, used
from recorded_of_all($1, $2, $3, $4, $5);
