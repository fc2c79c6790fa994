-- Secrets that runs opened: a step of kind `secret` for each, never a value.

-- name: note
-- Tells once, by a step and an event, that a run opened a secret, under a lease of the run or of one of its steps.
with h as materialized (
  select from item where org_id = $1 and item_id = $2 and token = $3 for update
),
s as (
  insert into step (org_id, run_id, step_key, name, kind, state, tries, attempt, started_at, finished_at)
  select $1, $4, $5, $6, 'secret', 'done', 1, $7, clock_timestamp(), clock_timestamp() from h
  on conflict (org_id, run_id, step_key) do nothing
  returning step_key
),
n as (
  update item set event_no = event_no + 1, duties = duties | $8::smallint
  from s where item.org_id = $1 and item.item_id = $4
  returning event_no
),
e as (
  insert into event (org_id, run_id, event_no, kind, step_key, data)
  select $1, $4, n.event_no, 'secret.opened', $5, json_build_object('name', $6::text, 'version', $9::int) from n
)
select true from h;

-- name: opened
-- Tells which secrets a run has opened.
select name from step where org_id = $1 and run_id = $2 and kind = 'secret' order by name;
