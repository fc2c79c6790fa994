-- Signals: what is sent to a run, and the waits that take them. All of it under the lock of the run's live row.

-- name: record_wait
-- Stores a step that waits for signals; `ref` is its own run, to which they are sent.
insert into step (org_id, run_id, step_key, name, kind, state, attempt, started_at, input, ref, seq)
values ($1, $2, $3, $4, 'signal', 'waiting', $5, clock_timestamp(), $6, $2, $7)
on conflict (org_id, run_id, step_key) do nothing
returning step_key;

-- name: ended
-- Reads how a wait ended, if it has.
select state, output, error from step where org_id = $1 and run_id = $2 and step_key = $3 and state in ('done', 'failed');

-- name: take
-- Gives a wait the oldest untaken signal of its names, or with $5 the oldest of each; nothing where one is missing.
with oldest as (
  select distinct on (s.name) s.signal_id, s.created_at from signal s
  where s.org_id = $1 and s.run_id = $2 and s.name = any($4::text[]) and s.step_key is null
  order by s.name, s.created_at, s.signal_id
),
picked as (
  select signal_id from oldest
  where not $5::bool or (select count(*) from oldest) = cardinality($4::text[])
  order by created_at, signal_id limit case when $5::bool then null else 1 end
)
update signal s set step_key = $3 from picked p
where s.org_id = $1 and s.run_id = $2 and s.signal_id = any(array[p.signal_id])
returning s.name, s.data, s.sent_by, s.created_at;

-- name: waits
-- Finds the waits of one run for signals of this name, oldest first.
select s.step_key, s.input from step s
where s.org_id = $1 and s.run_id = $2 and s.ref = $2 and s.state = 'waiting' and s.kind = 'signal'
  and $3 in (select json_array_elements_text(s.input->'names'))
order by s.started_at, s.step_key;

-- name: send
-- Stores a signal.
insert into signal (org_id, run_id, signal_id, name, data, sent_by) values ($1, $2, $3, $4, $5, $6)
returning created_at;

-- name: sent
-- Reads one signal.
select name, created_at from signal where org_id = $1 and run_id = $2 and signal_id = $3;
