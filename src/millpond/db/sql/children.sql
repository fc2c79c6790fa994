-- Child runs: started in a step of their parent, joined by another.

-- name: basis
-- Reads of runs, in order, what their children take over, how many generations there are up to them, themselves counted, and which child a step has started already.
select b.subject, b.priority, b.urgency, b.labels, b.traceparent, b.stamp, b.permission, b.lent, b.granted_by, b.behind, g.generations, k.known
from unnest($1::bigint[], $2::uuid[], $3::text[]) with ordinality as u(org_id, run_id, step_key, ord)
cross join lateral (
  select r.subject, r.priority, coalesce(r.urgency, 'standard') as urgency, r.labels, r.traceparent, r.stamp, r.permission, r.lent, r.granted_by, r.behind
  from run r where r.org_id = u.org_id and r.run_id = u.run_id offset 0
) b
cross join lateral (
  with recursive up as (
    select r.parent_id, 1 as generations from run r where r.org_id = u.org_id and r.run_id = u.run_id
    union all
    select p.parent_id, up.generations + 1 from up cross join lateral (
      select r.parent_id from run r where r.org_id = u.org_id and r.run_id = up.parent_id offset 0
    ) p
    where up.generations < $4::int
  )
  select max(up.generations) as generations from up
) g
left join lateral (
  select s.ref as known from step s where s.org_id = u.org_id and s.run_id = u.run_id and s.step_key = u.step_key and s.kind = 'child' offset 0
) k on true
order by u.ord;

-- name: published
-- Finds a flow's version, or its newest, as workers have published it.
select version, queue, timeout_s, deadline_s, keys, urgency from flow_version
where flow = $1 and ($2::int is null or version = $2) order by version desc limit 1;

-- name: record_children
-- Stores the steps that start children, each with its event, and what the ends of their runs see to; the runs are locked.
with u as materialized (
  select u.*, row_number() over (partition by u.org_id, u.run_id order by u.ord) as nth
  from unnest($1::bigint[], $2::uuid[], $3::text[], $4::text[], $5::json[], $6::uuid[], $7::int[], $8::int[], $9::json[], $10::smallint[])
    with ordinality as u(org_id, run_id, step_key, name, output, ref, attempt, seq, data, duties, ord)
),
steps as (
  insert into step (org_id, run_id, step_key, name, kind, state, output, ref, attempt, started_at, finished_at, seq)
  select org_id, run_id, step_key, name, 'child', 'done', output, ref, attempt, clock_timestamp(), clock_timestamp(), seq from u
),
r as materialized (select org_id, run_id, count(*)::int as many, bit_or(duties) as duties from u group by org_id, run_id),
i as (
  update item i set event_no = i.event_no + r.many, duties = i.duties | r.duties
  from r where i.org_id = any(array[r.org_id]) and i.item_id = any(array[r.run_id])
  returning i.org_id, i.item_id, i.event_no - r.many as base
)
insert into event (org_id, run_id, event_no, kind, step_key, data)
select u.org_id, u.run_id, i.base + u.nth, 'child.started', u.step_key, u.data
from u join i on i.org_id = u.org_id and i.item_id = u.run_id;

-- name: record_joins
-- Stores steps that wait for children's ends; those stored before do not come back.
insert into step (org_id, run_id, step_key, name, kind, state, ref, attempt, started_at, seq)
select org_id, run_id, step_key, name, 'join', 'waiting', ref, attempt, clock_timestamp(), seq
from unnest($1::bigint[], $2::uuid[], $3::text[], $4::text[], $5::uuid[], $6::int[], $7::int[])
  as u(org_id, run_id, step_key, name, ref, attempt, seq)
on conflict (org_id, run_id, step_key) do nothing
returning org_id, run_id, step_key;

-- name: last_of_chains
-- Finds the runs that children have continued as in the end.
select u.ord, l.run_id, l.outcome, l.parent_id
from unnest($1::bigint[], $2::uuid[]) with ordinality as u(org_id, child_id, ord)
cross join lateral (
  with recursive chain as (
    select r.run_id, r.continued_to, r.outcome, r.parent_id from run r where r.org_id = u.org_id and r.run_id = u.child_id
    union all
    select n.run_id, n.continued_to, n.outcome, n.parent_id
    from chain c cross join lateral (
      select r.run_id, r.continued_to, r.outcome, r.parent_id from run r
      where r.org_id = u.org_id and r.run_id = c.continued_to offset 0
    ) n
  )
  select run_id, outcome, parent_id from chain where continued_to is null
) l;

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
