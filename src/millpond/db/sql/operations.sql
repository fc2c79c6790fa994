-- name: lock_live
-- Locks the live row of one run.
select state, lane_id, rank, cancel_requested, attempt, started_at, duties from item
where org_id = $1 and item_id = $2 for update;

-- name: outcome
-- Reads how a run ended.
select outcome from run where org_id = $1 and run_id = $2;

-- name: request_cancel
-- Asks the worker that holds the run, or takes it up next, to stop it; a blocked one may go on for that.
update item set cancel_requested = true, blocked = null where org_id = $1 and item_id = $2;

-- name: unqueue
-- Takes a run out of its lane.
delete from ready where org_id = $1 and lane_id = $2 and rank = $3 and item_id = $4;

-- name: end_live
-- Removes the live row of a run that has ended.
delete from item where org_id = $1 and item_id = $2;

-- name: end_run
-- Gives a run its outcome.
update run set outcome = 'cancelled', attempts = $3, started_at = $4, finished_at = clock_timestamp()
where org_id = $1 and run_id = $2;
