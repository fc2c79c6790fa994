-- Runs that stand still until a person resumes them.

-- name: block
-- Lets the locked live row wait, blocked for the given reason, with the event that tells of it.
with i as (
  update item set state = 'waiting', token = null, event_no = event_no + 1, blocked = $3
  where org_id = $1 and item_id = $2 returning event_no
)
insert into event (org_id, run_id, event_no, kind, data)
select $1, $2, i.event_no, 'run.blocked', $3::json from i;

-- name: lock_blocked
-- Locks the live row of a run and tells whether it is blocked.
select blocked is not null as is_blocked from item where org_id = $1 and item_id = $2 and kind = 'run' for update;

-- name: unblock
-- Lets a locked run be queued again.
update item set blocked = null where org_id = $1 and item_id = $2;
