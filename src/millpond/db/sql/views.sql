-- name: run_page
-- Ids of one page of runs: below $2, or above $3 if given. $4 flow, $5 queue, $6-$7 created, $8-$9 search, $11 labels.
with matching as not materialized (
  select run_id from run
  where org_id = $1
    and ($4::text is null or flow = $4) and ($5::text is null or queue = $5)
    and ($6::timestamptz is null or created_at >= $6) and ($7::timestamptz is null or created_at < $7)
    and ($8::text is null or flow ilike $8 or labels::text ilike $8 or run_id::text like $9)
    and ($11::jsonb is null or labels::jsonb @> $11)
)
(select run_id from matching where $3::uuid is null and run_id < $2::uuid
 order by run_id desc limit $10)
union all
(select run_id from matching where $3::uuid is not null and run_id > $3::uuid order by run_id limit $10);

-- name: finished_run_page
-- As run_page, of runs with one of the final states $12.
with matching as not materialized (
  select run_id from run
  where org_id = $1 and outcome = any($12::text[])
    and ($4::text is null or flow = $4) and ($5::text is null or queue = $5)
    and ($6::timestamptz is null or created_at >= $6) and ($7::timestamptz is null or created_at < $7)
    and ($8::text is null or flow ilike $8 or labels::text ilike $8 or run_id::text like $9)
    and ($11::jsonb is null or labels::jsonb @> $11)
)
(select run_id from matching where $3::uuid is null and run_id < $2::uuid
 order by run_id desc limit $10)
union all
(select run_id from matching where $3::uuid is not null and run_id > $3::uuid order by run_id limit $10);

-- name: live_run_page
-- As run_page, of runs with one of the live states $12: read from the narrow rows, which are only the live ones.
with matching as not materialized (
  select r.run_id from item i join run r on r.org_id = i.org_id and r.run_id = i.run_id
  where i.org_id = $1 and i.kind = 'run' and i.state = any($12::text[])
    and ($4::text is null or r.flow = $4) and ($5::text is null or r.queue = $5)
    and ($6::timestamptz is null or r.created_at >= $6) and ($7::timestamptz is null or r.created_at < $7)
    and ($8::text is null or r.flow ilike $8 or r.labels::text ilike $8 or r.run_id::text like $9)
    and ($11::jsonb is null or r.labels::jsonb @> $11)
)
(select run_id from matching where $3::uuid is null and run_id < $2::uuid
 order by run_id desc limit $10)
union all
(select run_id from matching where $3::uuid is not null and run_id > $3::uuid order by run_id limit $10);

-- name: runs
-- Runs by their ids, newest first, with the state they have now; values of more than $3 bytes are left out.
select r.run_id, r.flow, r.version, r.queue, coalesce(r.outcome, i.state) as state, r.priority,
       case when pg_column_size(r.input) <= $3 and octet_length(r.input::text) <= $3 then r.input end as input,
       case when pg_column_size(r.output) <= $3 and octet_length(r.output::text) <= $3 then r.output end as output,
       r.error, r.subject, coalesce(r.attempts, i.attempt, 0) as attempts, r.created_at,
       coalesce(r.started_at, i.started_at) as started_at, r.finished_at, r.labels,
       coalesce(i.cancel_requested, false) as cancel_requested, r.rerun_of, r.rerun_from, i.blocked, r.deadline_at,
       r.dedup_key, coalesce(r.urgency, 'standard') as urgency
from run r left join item i on i.org_id = r.org_id and i.item_id = r.run_id
where r.org_id = $1 and r.run_id = any($2::uuid[])
order by r.run_id desc;

-- name: reruns
-- Ids of the runs that repeat one run, newest first.
select run_id from run where org_id = $1 and rerun_of = $2 order by run_id desc limit 100;

-- name: steps
-- Recorded steps of one run, in the order in which they began; one that waits or runs in another queue names it.
select s.step_key, s.name, s.kind, s.state, coalesce(s.output, p.body) as output, s.error, s.tries, s.started_at,
       s.finished_at, i.queue
from step s
left join payload p on s.output is null and s.state = 'done' and p.org_id = s.org_id and p.run_id = s.run_id
  and p.slot = 'step:' || s.step_key
left join item i on s.state = 'waiting' and i.org_id = s.org_id and i.item_id = s.ref and i.kind = 'step'
where s.org_id = $1 and s.run_id = $2
order by s.started_at, s.step_key limit 10000;

-- name: kin
-- The runs that one run comes from and goes on as.
select parent_id, continued_from, continued_to from run where org_id = $1 and run_id = $2;

-- name: state_values
-- What a run's flow shows to the outside: the newest value of each name.
select distinct on (name) name, output from step
where org_id = $1 and run_id = $2 and kind = 'state'
order by name, finished_at desc, step_key desc;

-- name: event_position
-- Whether a run exists, whether it is over, and the number of its last event.
select r.outcome is not null as is_over,
       (select max(event_no) from event e where e.org_id = r.org_id and e.run_id = r.run_id) as last_no
from run r where r.org_id = $1 and r.run_id = $2;

-- name: request_page
-- Ids of one page of questions by id: below $2, or above $3 where given. $4 state, $5 role, $6 run.
with matching as not materialized (
  select request_id from input_request
  where org_id = $1 and ($4::text is null or state = $4) and ($5::text is null or role = $5)
    and ($6::uuid is null or run_id = $6)
)
(select request_id from matching where $3::uuid is null and request_id < $2::uuid
 order by request_id desc limit $7)
union all
(select request_id from matching where $3::uuid is not null and request_id > $3::uuid
 order by request_id limit $7);

-- name: requests
-- Questions to humans by their ids, newest first.
select request_id, run_id, step_key, role, title, form, proposal, digest, state, kind, expires_at, created_at, answer,
       resolved_by, resolved_at
from input_request where org_id = $1 and request_id = any($2::uuid[])
order by request_id desc;

-- name: published_flows
-- Every flow version that a worker has published, and whether a live worker has it now.
select f.flow, f.version, f.queue, f.permission, f.description, f.input_schema, f.output_schema, f.timeout_s,
       f.deadline_s, f.published_at, f.labels as needs, f.keys, f.urgency,
       exists (select from worker w
               where w.expires_at > clock_timestamp() and f.flow || '@' || f.version = any(w.capabilities)) as is_served
from flow_version f order by f.flow, f.version;

-- name: served_queues
-- Queues of live workers, with the slots of all of them together; a queue that is only helped has none.
select s.queue, count(*)::int as workers, sum(s.slots::int)::int as slots
from worker w, json_each_text(w.queues) as s(queue, slots)
where w.expires_at > clock_timestamp() and not w.draining
group by s.queue order by s.queue;
