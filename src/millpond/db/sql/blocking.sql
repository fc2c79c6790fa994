-- Runs that stand still until a person resumes them.

-- name: block
-- Lets the locked live row wait, blocked for the given reason, with the event that tells of it.
with i as (
  update item set state = 'waiting', token = null, event_no = event_no + 1, blocked = $3,
                  deaths = case when lane_id & 2 = 2 then 0 else deaths end, lane_id = lane_id & ~2::bigint
  where org_id = $1 and item_id = $2 returning event_no
)
insert into event (org_id, run_id, event_no, kind, data)
select $1, $2, i.event_no, 'run.blocked', $3::json from i;

-- name: block_step
-- Lets a locked step in another queue wait, blocked for the given reason; its lease is gone already.
update item set state = 'waiting', token = null, blocked = $3,
                deaths = case when lane_id & 2 = 2 then 0 else deaths end, lane_id = lane_id & ~2::bigint
where org_id = $1 and item_id = $2;

-- name: lock_steps
-- Locks the blocked steps of a run in other queues.
select item_id from item where org_id = $1 and run_id = $2 and kind = 'step' and blocked is not null
order by item_id for update;

-- name: lock_blocked
-- Locks the live row of a run and tells whether it is blocked.
select blocked is not null as is_blocked from item where org_id = $1 and item_id = $2 and kind = 'run' for update;

-- name: unblock
-- Lets a locked run, or locked steps, be queued again.
update item set blocked = null where org_id = $1 and item_id = any($2::uuid[]);
