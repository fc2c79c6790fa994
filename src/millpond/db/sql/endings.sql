-- What the end of a run sees to, in the transaction of that end.

-- name: drop_waits
-- Removes what ended runs still waited for.
with u as materialized (select * from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)),
timers as (
  delete from timer t using u where t.org_id = any(array[u.org_id]) and t.run_id = any(array[u.run_id])
)
update input_request q set state = 'cancelled', resolved_at = clock_timestamp()
from (
  select p.org_id, p.request_id, p.state from u cross join lateral (
    select p.org_id, p.request_id, p.state from input_request p
    where p.org_id = u.org_id and p.run_id = u.run_id and p.state = 'pending' offset 0
  ) p offset 0
) p
where q.org_id = any(array[p.org_id]) and q.request_id = any(array[p.request_id]) and q.state = p.state;

-- name: free_keys
-- Gives back the live keys of ended runs.
delete from live_key k
using (
  select u.org_id, u.run_id, h.key from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
  cross join lateral (select h.key from live_key h where h.org_id = u.org_id and h.run_id = u.run_id offset 0) h offset 0
) h
-- Said so, it asks for the key's index alone.
where k.org_id = any(array[h.org_id]) and k.key = any(array[h.key]) and k.run_id is not distinct from h.run_id;

-- name: lock_parents
-- Locks the live rows of parents, in the order of group commits; tells for each ended child which child its parent had started.
select d.org_id, d.child_id, d.parent_id, d.first_id, i.state
from (select r.org_id, r.run_id as child_id, r.parent_id, s.ref as first_id
      from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
      cross join lateral (
        select r.org_id, r.run_id, r.parent_id, r.parent_key from run r
        where r.org_id = u.org_id and r.run_id = u.run_id offset 0
      ) r
      join step s on s.org_id = any(array[r.org_id]) and s.run_id = any(array[r.parent_id])
        and s.step_key = any(array[r.parent_key]) and s.kind = 'child'
      order by r.parent_id) d
cross join lateral (select i.state from item i where i.org_id = d.org_id and i.item_id = d.parent_id for update) i;

-- name: end_joins
-- Records how children ended in the steps that wait for them, each with its event; the parents are locked.
with ended as materialized (
  -- An error that holds the character 0 cannot be looked into; as a whole it is passed on.
  select r.org_id, u.parent_id, j.step_key, r.run_id, r.outcome, r.output, r.error,
         case when strpos(r.error::text, '\u0000') = 0 then r.error end as told
  from unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::uuid[]) as u(org_id, child_id, parent_id, first_id)
  join run r on r.org_id = any(array[u.org_id]) and r.run_id = any(array[u.child_id])
  cross join lateral (
    select j.step_key from step j
    where j.org_id = u.org_id and j.run_id = u.parent_id and j.ref = u.first_id and j.state = 'waiting' and j.kind = 'join'
    for update
  ) j
),
s as (
  update step s set finished_at = clock_timestamp(),
    state = case when e.outcome = 'succeeded' then 'done' else 'failed' end,
    output = case when e.outcome = 'succeeded' then e.output end,
    error = case when e.outcome <> 'succeeded' then json_build_object(
      'class', 'ChildFailed', 'code', coalesce(e.told->>'code', e.outcome),
      'message', coalesce(e.told->>'message', case e.outcome when 'failed' then 'it failed' else 'it was cancelled' end),
      'run_id', e.run_id, 'outcome', e.outcome, 'error', e.error) end
  from ended e
  where s.org_id = any(array[e.org_id]) and s.run_id = any(array[e.parent_id]) and s.step_key = any(array[e.step_key])
  returning s.org_id, s.run_id, s.step_key, s.name, e.run_id as child_id, e.outcome
),
payloads as (
  insert into payload (org_id, run_id, slot, body)
  select s.org_id, s.run_id, 'step:' || s.step_key, p.body
  from s cross join lateral (
    select p.body from payload p where p.org_id = s.org_id and p.run_id = s.child_id and p.slot = 'output' offset 0
  ) p
  where s.outcome = 'succeeded'
  on conflict (org_id, run_id, slot) do nothing
),
c as materialized (
  select s.*, row_number() over (partition by org_id, run_id order by step_key) as nth,
         count(*) over (partition by org_id, run_id) as many from s
),
i as (
  update item i set event_no = i.event_no + c.many from c
  where c.nth = 1 and i.org_id = any(array[c.org_id]) and i.item_id = any(array[c.run_id])
  returning i.org_id, i.item_id, i.event_no - c.many as base
)
insert into event (org_id, run_id, event_no, kind, step_key, data)
select c.org_id, c.run_id, i.base + c.nth, 'child.ended', c.step_key,
       json_build_object('name', c.name, 'run_id', c.child_id, 'outcome', c.outcome)
from c join i on i.org_id = c.org_id and i.item_id = c.run_id
returning org_id, run_id;

-- name: cancel_children
-- Asks for the cancel of live children whose parent has ended, where their close policy says so.
insert into chore (org_id, kind, run_id, asked_by, reason)
select r.org_id, 'cancel', r.run_id, 'run:' || u.run_id, 'its parent has ended'
from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
-- `offset 0`: by key for each parent, however small the table was when this was planned.
cross join lateral (
  select r.org_id, r.run_id from run r
  where r.org_id = u.org_id and r.parent_id = u.run_id and r.close_policy = 'cancel' and r.outcome is null offset 0
) r;

-- name: with_parent
-- Finds those of some runs that have a parent.
select r.run_id from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
cross join lateral (
  select r.run_id, r.parent_id from run r where r.org_id = u.org_id and r.run_id = u.run_id offset 0
) r
where r.parent_id is not null;
