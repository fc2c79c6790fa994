-- Live keys: of each, one run is live at a time. A run's live row is locked before its key, never after.

-- name: take
-- Takes free keys for runs about to be submitted, in key order; those held do not come back. Waits for whoever takes or frees one.
insert into live_key (org_id, key, run_id)
select $1, u.key, u.run_id from unnest($2::text[], $3::uuid[]) as u(key, run_id)
order by u.key
on conflict (org_id, key) do nothing
returning run_id;

-- name: line_up
-- Lets one at a time, of those that found a key held, see to it; until the end of the transaction.
select pg_advisory_xact_lock(hashtextextended($2, $1));

-- name: holders
-- Reads which live runs hold keys.
select k.key, k.run_id, r.flow, r.version, r.queue, r.priority, r.labels, i.state
from live_key k
join run r on r.org_id = any(array[k.org_id]) and r.run_id = any(array[k.run_id])
join item i on i.org_id = any(array[k.org_id]) and i.item_id = any(array[k.run_id])
where k.org_id = $1 and k.key = any($2::text[]);

-- name: free_orphan
-- Removes a key whose run is no more, as a worker of an earlier release leaves it.
delete from live_key k where k.org_id = $1 and k.key = $2
  and not exists (select from item i where i.org_id = k.org_id and i.item_id = k.run_id offset 0);

-- name: free
-- Takes a key from the run that held it, whose live row is locked or gone.
delete from live_key where org_id = $1 and key = $2 and run_id = $3;
