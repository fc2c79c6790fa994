-- Schedules: runs at times of a calendar.

-- name: now
-- Tells the time.
select clock_timestamp();

-- name: create
-- Stores a schedule unless the org has one of its name.
insert into schedule (org_id, schedule_id, name, flow, version, queue, input, priority, labels, cron, time_zone, missed,
                      overlap, is_paused, next_due_at, created_by)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
on conflict (org_id, name) do nothing
returning schedule_id;

-- name: change
-- Replaces what a person decides of a schedule, unless another did since $16; $17 tells whether $15 is the next due time.
update schedule
set name = $3, flow = $4, version = $5, queue = $6, input = $7, priority = $8, labels = $9, cron = $10, time_zone = $11,
    missed = $12, overlap = $13, is_paused = $14, next_due_at = case when $17 then $15 else next_due_at end,
    last_error = null, updated_at = clock_timestamp(),
    changed_by = case when $18 = created_by or $18 = any(changed_by) then changed_by else changed_by || $18::text end
where org_id = $1 and schedule_id = $2 and updated_at = $16
returning schedule_id;

-- name: delete
-- Removes a schedule; its runs stay.
delete from schedule where org_id = $1 and schedule_id = $2 returning schedule_id;

-- name: started
-- Notes the run that a person started.
update schedule set last_run_id = $3 where org_id = $1 and schedule_id = $2;

-- name: get
-- One schedule.
select schedule_id, name, flow, version, queue, input, priority, labels, cron, time_zone, missed, overlap, is_paused,
       next_due_at, last_due_at, last_run_id, last_error, created_by, created_at, updated_at
from schedule where org_id = $1 and schedule_id = $2;

-- name: page
-- One page of schedules by id: below $2, or above $3 where given; $5 is a name.
(select schedule_id, name, flow, version, queue, input, priority, labels, cron, time_zone, missed, overlap, is_paused,
        next_due_at, last_due_at, last_run_id, last_error, created_by, created_at, updated_at
 from schedule where org_id = $1 and $3::uuid is null and schedule_id < $2::uuid and ($5::text is null or name = $5)
 order by schedule_id desc limit $4)
union all
(select schedule_id, name, flow, version, queue, input, priority, labels, cron, time_zone, missed, overlap, is_paused,
        next_due_at, last_due_at, last_run_id, last_error, created_by, created_at, updated_at
 from schedule where org_id = $1 and $3::uuid is not null and schedule_id > $3::uuid and ($5::text is null or name = $5)
 order by schedule_id limit $4);

-- name: take_due
-- Locks due schedules, earliest first; $2 names one. Those whose flow no live worker has come after $3 seconds, once.
select s.org_id, s.schedule_id, s.name, s.flow, s.version, s.queue, s.input, s.priority, s.labels, s.cron, s.time_zone,
       s.missed, s.overlap, s.next_due_at, s.created_by, s.changed_by, last.run_id as last_run_id, clock_timestamp() as now,
       exists (select from item i where i.org_id = s.org_id and i.item_id = last.run_id) as is_last_live
from schedule s
-- The last run, or the one that it has continued as in the end.
left join lateral (
  with recursive chain as (
    select r.run_id, r.continued_to from run r where r.org_id = s.org_id and r.run_id = s.last_run_id
    union all
    select r.run_id, r.continued_to from chain c join run r on r.org_id = s.org_id and r.run_id = c.continued_to
  )
  select run_id from chain where continued_to is null
) last on true
where not s.is_paused and s.next_due_at <= clock_timestamp()
  and not exists (select from org o where o.org_id = s.org_id and o.suspended_at is not null)
  and ($2::uuid is null or s.schedule_id = $2)
  and (s.next_due_at < clock_timestamp() - $3 * interval '1 second'
         and coalesce(s.last_error, '') not like 'flow\_not\_served%'
       or exists (select from worker w, unnest(w.capabilities) as c(name)
                  where w.expires_at > clock_timestamp()
                    and case when s.version is null then starts_with(c.name, s.flow || '@')
                             else c.name = s.flow || '@' || s.version end))
order by s.next_due_at limit $1
for update of s skip locked;

-- name: known_runs
-- Finds those of the runs that exist already.
select distinct u.org_id, u.run_id from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
cross join lateral (select from run r where r.org_id = u.org_id and r.run_id = u.run_id offset 0) r;

-- name: ask_cancels
-- Has runs cancelled in a transaction of its own.
insert into chore (org_id, kind, run_id, asked_by, reason)
select u.org_id, 'cancel', u.run_id, u.asked_by, u.reason
from unnest($1::bigint[], $2::uuid[], $3::text[], $4::text[]) as u(org_id, run_id, asked_by, reason);

-- name: settle
-- Moves locked schedules on to their next due time; a run that was not started leaves the last one in its place.
update schedule s
set next_due_at = u.next_due_at, last_due_at = coalesce(u.last_due_at, s.last_due_at),
    last_run_id = coalesce(u.last_run_id, s.last_run_id), last_error = u.last_error
from unnest($1::bigint[], $2::uuid[], $3::timestamptz[], $4::timestamptz[], $5::uuid[], $6::text[])
  as u(org_id, schedule_id, next_due_at, last_due_at, last_run_id, last_error)
where s.org_id = any(array[u.org_id]) and s.schedule_id = any(array[u.schedule_id]);

-- name: due_ids
-- Names schedules whose time has come, earliest first.
select org_id, schedule_id from schedule s where not is_paused and next_due_at <= clock_timestamp()
  and not exists (select from org o where o.org_id = s.org_id and o.suspended_at is not null)
order by next_due_at limit $1;

-- name: note_failure
-- Stops a schedule that cannot be fired, with the reason, until a person changes or resumes it.
update schedule set next_due_at = null, last_error = $3 where org_id = $1 and schedule_id = $2;
