-- Steps whose effect may happen once, and the answers of humans about them.

-- name: doubt
-- Records that nobody knows whether a begun step took effect; `ref` is the question about it.
update step set state = 'unknown', ref = $4, error = $5
where org_id = $1 and run_id = $2 and step_key = $3 and state = 'begun'
returning name;

-- name: settle
-- Records what a human said about a step of unknown outcome; `retrying` lets it be tried again.
update step set state = $4, output = $5, error = $6,
                finished_at = case when $4 = 'retrying' then null else clock_timestamp() end
where org_id = $1 and run_id = $2 and step_key = $3 and state = 'unknown'
returning name, tries;
