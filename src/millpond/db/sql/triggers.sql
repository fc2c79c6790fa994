-- Triggers: flows that start when events arrive; the events, and the groups in which they wait.

-- name: listeners
-- Counts the triggers for an event.
select count(*) from trigger where org_id = $1 and event = $2;

-- name: create
-- Stores a trigger unless the org has one of its name.
insert into trigger (org_id, trigger_id, name, event, filter, flow, version, queue, priority, labels, mode, group_by,
                     period_s, max_wait_s, max_count, is_paused, created_by)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
on conflict (org_id, name) do nothing
returning trigger_id;

-- name: change
-- Replaces what a person decides of a trigger, unless another did since $17.
update trigger
set name = $3, event = $4, filter = $5, flow = $6, version = $7, queue = $8, priority = $9, labels = $10, mode = $11,
    group_by = $12, period_s = $13, max_wait_s = $14, max_count = $15, is_paused = $16, last_error = null,
    updated_at = clock_timestamp(),
    changed_by = case when $18 = created_by or $18 = any(changed_by) then changed_by else changed_by || $18::text end
where org_id = $1 and trigger_id = $2 and updated_at = $17
returning trigger_id;

-- name: wake_groups
-- Lets groups that a pause put off be due now; it waits for whoever puts one off meanwhile, so that none is missed.
update trigger_group
set due_at = case when due_at > clock_timestamp() + interval '30 seconds' then due_at else clock_timestamp() end
where org_id = $1 and trigger_id = $2;

-- name: delete
-- Removes a trigger; its runs stay.
delete from trigger where org_id = $1 and trigger_id = $2 returning trigger_id;

-- name: delete_groups
-- Drops what waited for a trigger that is gone.
delete from trigger_group where org_id = $1 and trigger_id = $2;

-- name: get
-- One trigger.
select trigger_id, name, event, filter, flow, version, queue, priority, labels, mode, group_by, period_s, max_wait_s,
       max_count, is_paused, dropped, last_error, created_by, created_at, updated_at
from trigger where org_id = $1 and trigger_id = $2;

-- name: page
-- One page of triggers by id: below $2, or above $3 where given; $5 is a name.
(select trigger_id, name, event, filter, flow, version, queue, priority, labels, mode, group_by, period_s, max_wait_s,
        max_count, is_paused, dropped, last_error, created_by, created_at, updated_at
 from trigger where org_id = $1 and $3::uuid is null and trigger_id < $2::uuid and ($5::text is null or name = $5)
 order by trigger_id desc limit $4)
union all
(select trigger_id, name, event, filter, flow, version, queue, priority, labels, mode, group_by, period_s, max_wait_s,
        max_count, is_paused, dropped, last_error, created_by, created_at, updated_at
 from trigger where org_id = $1 and $3::uuid is not null and trigger_id > $3::uuid and ($5::text is null or name = $5)
 order by trigger_id limit $4);

-- name: waiting
-- Counts what waits for a trigger: groups, events in them, and events dropped in those groups so far.
select count(*) as groups, coalesce(sum(json_array_length(events)), 0)::bigint as events,
       coalesce(sum(dropped), 0)::bigint as dropped
from trigger_group where org_id = $1 and trigger_id = $2;
