-- name: claim_keys
-- Takes idempotency keys for runs about to be submitted, in key order; those taken already do not come back. Waits for rivals.
insert into idempotency (org_id, subject, route, key, digest, run_id)
select $1, u.subject, u.route, u.key, u.digest, u.run_id
from unnest($2::text[], $3::text[], $4::text[], $5::bytea[], $6::uuid[]) as u(subject, route, key, digest, run_id)
order by u.subject, u.route, u.key
on conflict (org_id, subject, route, key) do nothing
returning run_id;

-- name: release_keys
-- Gives back keys that were claimed in this transaction.
delete from idempotency i using unnest($2::text[], $3::text[], $4::text[]) as u(subject, route, key)
where i.org_id = $1 and i.subject = u.subject and i.route = u.route and i.key = u.key;

-- name: note_answer
-- Stores what is answered under a key, where that does not follow from its run alone.
update idempotency set run_id = $5, answer = $6
where org_id = $1 and subject = $2 and route = $3 and key = $4;

-- name: first_answer
-- Reads what a key was first used for.
select i.digest, i.run_id, i.answer, r.flow, r.version, r.queue, r.priority, r.labels
from idempotency i left join run r on r.org_id = i.org_id and r.run_id = i.run_id
where i.org_id = $1 and i.subject = $2 and i.route = $3 and i.key = $4;
