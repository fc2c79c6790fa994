-- Runs that repeat others, from the start or from a step on.

-- name: source
-- Reads what a repeat of a run needs; a large input stands apart, and a child that was poison is named where it failed the run.
select r.flow, r.version, r.queue, r.subject, r.priority, coalesce(r.urgency, 'standard') as urgency, r.keys, r.labels, coalesce(r.input, p.body) as input, r.outcome,
       case when strpos(r.error::text, '\u0000') = 0 then r.error->>'code' end as error_code,
       case when strpos(r.error::text, '\u0000') = 0 and r.error->>'class' = 'StepFailed' then r.error->>'step' end as failed_step,
       case when strpos(r.error::text, '\u0000') = 0 and r.error->>'class' = 'ChildFailed' and r.error->>'code' = 'poison' then (
         select (s.error->>'run_id')::uuid from step s
         where s.org_id = r.org_id and s.run_id = r.run_id and s.kind = 'join' and s.state = 'failed'
           and case when strpos(s.error::text, '\u0000') = 0 then s.error->>'code' end = 'poison'
         order by s.finished_at desc limit 1) end as poisoned_child,
       extract(epoch from r.deadline_at - r.created_at)::float8 as deadline_s, r.dedup_key, r.stamp, r.permission, r.lent, r.granted_by
from run r left join payload p on p.org_id = r.org_id and p.run_id = r.run_id and p.slot = 'input' and r.input is null
where r.org_id = $1 and r.run_id = $2;

-- name: hold
-- Keeps a run and what belongs to it from being deleted until the transaction ends.
select 1 from run where org_id = $1 and run_id = $2 for key share;

-- name: step_keys
-- Reads the keys of a run's recorded steps, in the order in which they began.
select step_key from step where org_id = $1 and run_id = $2 order by started_at, step_key limit 10000;

-- name: copy_steps
-- Copies steps of run $2 to run $3, all ($5: but poison of it) or those over before step $4 began, and `once` effects; none undone.
with target as materialized (
  -- Waits begin again. An effect whose outcome is unknown is copied as begun, so that a human is asked.
  select started_at from step where org_id = $1 and run_id = $2 and step_key = $4::text
),
chosen as materialized (
  select s.*,
         case when $4::text is null then s.state in ('done', 'failed', 'retrying', 'begun', 'unknown')
              else s.step_key <> $4 and s.state in ('done', 'failed') and s.finished_at <= (select started_at from target)
         end as is_before
  from step s
  -- Of secrets that the other run opened, it tells itself.
  where s.org_id = $1 and s.run_id = $2 and s.kind <> 'secret'
    -- What failed the run is to be done again; where its flow had gone on without it, its failure is history.
    and not ($5::text is not null and $4::text is null and s.kind = 'step' and s.state = 'failed' and s.name = $5
             and coalesce(case when strpos(s.error::text, '\u0000') = 0 then s.error->>'code' end, '') = 'poison')
    -- A run that goes on from a step, or does one again, has its endings before it again.
    and ($4::text is null and $5 is null or not starts_with(s.step_key, '!') and not exists (
      select from step u
      where u.org_id = s.org_id and u.run_id = s.run_id and u.state = 'done'
        and starts_with(u.step_key, '!undo/' || s.step_key || '/')))
),
copied as (
  insert into step (org_id, run_id, step_key, name, kind, state, output, error, tries, attempt, started_at, finished_at, seq,
                    effect, ref, input)
  select org_id, $3, step_key, name, kind, case when state = 'unknown' then 'begun' else state end, output, error, tries, 0,
         started_at, finished_at, case when is_before then seq end, effect, ref, input
  from chosen where is_before or (effect = 'once' and state in ('done', 'begun', 'unknown'))
  returning step_key
),
bodies as (
  insert into payload (org_id, run_id, slot, body)
  select p.org_id, $3, p.slot, p.body
  from payload p join copied c on p.slot = 'step:' || c.step_key
  where p.org_id = $1 and p.run_id = $2
)
select count(*) from copied;

-- name: suspect
-- Lets a run that is not queued yet be executed alone from its first attempt on.
update item set deaths = $3 where org_id = $1 and item_id = $2 and state = 'scheduled';

-- name: made_at
-- Tells when a run was made; nothing comes back when there is none.
select created_at, stamp, permission, lent, granted_by from run where org_id = $1 and run_id = $2;
