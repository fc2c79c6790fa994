-- Pauses: work that is not claimed until somebody resumes it. Read by the claim (claim.sql).

-- name: pause
-- Pauses a queue, a flow or all work of an org; what is paused already stays as it is.
insert into pause (org_id, queue, flow, paused_by, reason) values ($1, $2, $3, $4, $5)
on conflict (org_id, queue, flow) do nothing;

-- name: resume
-- Lifts a pause of an org; waits for a claim that rests its orgs because of it.
delete from pause where org_id = $1 and queue = $2 and flow = $3 returning org_id;

-- name: arrive
-- Brings an org back into the fair order of its queues, by an arrival in each; a statement after the pause is lifted.
insert into arrival (org_id, lane_id, queue, capability, keys, offset_us, min_rank)
select distinct on (l.queue) l.org_id, l.lane_id, l.queue, l.capability, l.keys, l.offset_us, l.cursor_rank
from lane l
where l.org_id = $1 and l.active and $2 in ('', l.queue)
  and ($3 = '' or $3 || '@' = rtrim(l.capability, '0123456789!'))
order by l.queue, l.cursor_rank
returning queue;

-- name: leave_org
-- Lets the next statement be the platform's: no org's transaction changes what holds every org.
select set_config('millpond.org', '', true);

-- name: enter_org
-- Goes on in the org's transaction.
select set_config('millpond.org', $1::bigint::text, true);

-- name: pause_queue
-- Pauses a queue for every org; one paused already stays as it is.
insert into queue_pause (queue, paused_by, reason) values ($1, $2, $3) on conflict (queue) do nothing;

-- name: resume_queue
-- Lifts the pause of a queue for every org.
delete from queue_pause where queue = $1 returning queue;

-- name: pauses
-- What holds work of an org: its own pauses, then those of queues for everyone.
select queue, flow, false as is_for_everyone, paused_by, reason, paused_at from pause where org_id = $1
union all
select queue, '', true, paused_by, reason, paused_at from queue_pause
order by 3, 1, 2;

-- name: knows_queue
-- Whether a queue is served, named by a flow, or has had work of this org.
select exists (select from flow_version where queue = $2)
    or exists (select from lane where org_id = $1 and queue = $2)
    or exists (select from arrival where org_id = $1 and queue = $2)
    or exists (select from worker w, json_object_keys(w.queues) as k(queue) where k.queue = $2);
