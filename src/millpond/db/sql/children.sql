-- Child runs: started in a step of their parent, joined by another.

-- name: basis
-- Reads what a child takes over from its parent, and how many generations there are up to it, itself counted.
with recursive up as (
  select parent_id, 1 as generations from run where org_id = $1 and run_id = $2
  union all
  select r.parent_id, up.generations + 1 from up cross join lateral (
    select r.parent_id from run r where r.org_id = $1 and r.run_id = up.parent_id offset 0
  ) r
  where up.generations < $3::int
)
select r.subject, r.priority, coalesce(r.urgency, 'standard') as urgency, r.labels, r.traceparent, r.stamp, r.permission, r.lent, r.granted_by, r.behind, (select max(generations) from up) as generations
from run r where r.org_id = $1 and r.run_id = $2;

-- name: published
-- Finds a flow's version, or its newest, as workers have published it.
select version, queue, timeout_s, deadline_s, keys, urgency from flow_version
where flow = $1 and ($2::int is null or version = $2) order by version desc limit 1;

-- name: known
-- Finds the child that a step has started already.
select ref from step where org_id = $1 and run_id = $2 and step_key = $3 and kind = 'child';

-- name: record_child
-- Stores the step that starts a child.
insert into step (org_id, run_id, step_key, name, kind, state, output, ref, attempt, started_at, finished_at,
                  seq)
values ($1, $2, $3, $4, 'child', 'done', $5, $6, $7, clock_timestamp(), clock_timestamp(), $8);

-- name: record_join
-- Stores a step that waits for a child's end.
insert into step (org_id, run_id, step_key, name, kind, state, ref, attempt, started_at, seq)
values ($1, $2, $3, $4, 'join', 'waiting', $5, $6, clock_timestamp(), $7)
on conflict (org_id, run_id, step_key) do nothing
returning step_key;

-- name: last_of_chain
-- Finds the run that a child has continued as in the end.
with recursive chain as (
  select run_id, continued_to, outcome, parent_id from run where org_id = $1 and run_id = $2
  union all
  select r.run_id, r.continued_to, r.outcome, r.parent_id
  from chain c cross join lateral (
    select r.run_id, r.continued_to, r.outcome, r.parent_id from run r
    where r.org_id = $1 and r.run_id = c.continued_to offset 0
  ) r
)
select run_id, outcome, parent_id from chain where continued_to is null;

-- name: joined
-- Reads how a join ended.
select s.state, coalesce(s.output, p.body) as output, s.error
from step s left join payload p on p.org_id = any(array[s.org_id]) and p.run_id = any(array[s.run_id])
  and p.slot = any(array['step:' || s.step_key])
where s.org_id = $1 and s.run_id = $2 and s.step_key = $3;

-- name: lineage
-- Reads what a run hands on to the one that continues it.
select flow, queue, subject, priority, coalesce(urgency, 'standard') as urgency, keys, timeout_s, traceparent, labels,
       dedup_key, parent_id, parent_key,
       close_policy, behind, extract(epoch from deadline_at - clock_timestamp())::float8 as left_s
from run where org_id = $1 and run_id = $2;

-- name: hand_on
-- Lets a run's successor hold its live key and have its untaken signals, and takes the duties off it that go over.
with told as (
  update signal set step_key = '!continued' where org_id = $1 and run_id = $2 and step_key is null
  returning signal_id, name, data, sent_by, created_at
),
signals as (
  insert into signal (org_id, run_id, signal_id, name, data, sent_by, created_at)
  select $1, $3, signal_id, name, data, sent_by, created_at from told
),
moved as (
  update live_key set run_id = $3 where org_id = $1 and run_id = $2
),
linked as (
  update run set continued_to = $3 where org_id = $1 and run_id = $2
)
update item set duties = duties & ~$4::smallint where org_id = $1 and item_id = $2;
