-- Failures in a row, counted by all workers together.

-- name: count
-- Counts failures of a step on a key under a lease that holds, those before $8 microseconds are broken off; returns how many it are in a row.
with t as materialized (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as us)
insert into failing as f (owner, key, step, failures, failed_us)
select $4, $5, $6, $7, t.us from lease e, t where e.org_id = $1 and e.item_id = $2 and e.token = $3
on conflict (owner, key, step) do update
  set failures = case when excluded.failed_us - f.failed_us > $8 then excluded.failures else f.failures + excluded.failures end,
      failed_us = greatest(f.failed_us, excluded.failed_us)
returning f.failures;

-- name: end
-- Ends rows of failures on these keys, of a step that succeeded under a lease that holds.
delete from failing f using unnest($4::bigint[], $5::text[], $6::text[]) as u(owner, key, step)
where f.owner = any(array[u.owner]) and f.key = any(array[u.key]) and f.step = any(array[u.step])
  and exists (select from lease e where e.org_id = $1 and e.item_id = $2 and e.token = $3);
