-- Chores: what the engine does to a run right after the change that asked for it.

-- name: list
-- Finds chores, oldest first.
select org_id, chore_id from chore order by chore_id limit $1;

-- name: take
-- Takes a chore that no other process is at.
delete from chore where (org_id, chore_id) in (
  select org_id, chore_id from chore where org_id = $1 and chore_id = $2 for update skip locked)
returning run_id, asked_by, reason;
