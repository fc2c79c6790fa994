-- name: claim_key
-- Takes an idempotency key for a run about to be submitted; nothing comes back when it is taken. Waits for a rival.
insert into idempotency (org_id, subject, route, key, digest, run_id) values ($1, $2, $3, $4, $5, $6)
on conflict (org_id, subject, route, key) do nothing
returning run_id;

-- name: first_answer
-- Reads what a key was first used for.
select i.digest, i.run_id, r.flow, r.version, r.queue, r.priority, r.labels
from idempotency i join run r on r.org_id = i.org_id and r.run_id = i.run_id
where i.org_id = $1 and i.subject = $2 and i.route = $3 and i.key = $4;
