-- Events that arrive from outside, and the groups in which they wait for their triggers.

-- name: receive
-- Stores events, locking in the order of their ids; those received before do not come back. Waits for rivals.
with t as materialized (select clock_timestamp() as at)
insert into inbound_event (org_id, event_id, name, data, sent_by, received_at)
select $1, u.event_id, u.name, u.data, $5, t.at + u.ord * interval '1 microsecond'
from t, unnest($2::text[], $3::text[], $4::json[]) with ordinality as u(event_id, name, data, ord)
order by u.event_id
on conflict (org_id, event_id) do nothing
returning event_id;

-- name: received
-- Reads events by their ids.
select event_id, name, data, sent_by, runs, received_at from inbound_event
where org_id = $1 and event_id = any($2::text[]);

-- name: listening
-- Triggers of an org that listen for events of these names, in one order for all.
select org_id, trigger_id, name, event, filter, flow, version, queue, priority, labels, mode, group_by, period_s,
       max_wait_s, max_count, last_error, created_by, changed_by
from trigger where org_id = $1 and event = any($2::text[]) and not is_paused
order by trigger_id;

-- name: lock_groups
-- Locks groups in one order for all, making those that are missing, and tells the time.
insert into trigger_group as g (org_id, trigger_id, group_key)
select $1, u.trigger_id, u.group_key from unnest($2::uuid[], $3::text[]) as u(trigger_id, group_key)
order by u.trigger_id, u.group_key
on conflict (org_id, trigger_id, group_key) do update set dropped = g.dropped
returning trigger_id, group_key, events, dropped, first_at, due_at, xmax = 0 as is_new;

-- name: now
-- Tells the time.
select clock_timestamp();

-- name: keep_groups
-- Stores how locked groups go on.
update trigger_group g set events = u.events, dropped = u.dropped, first_at = u.first_at, due_at = u.due_at
from unnest($1::bigint[], $2::uuid[], $3::text[], $4::json[], $5::int[], $6::timestamptz[], $7::timestamptz[])
  as u(org_id, trigger_id, group_key, events, dropped, first_at, due_at)
where g.org_id = any(array[u.org_id]) and g.trigger_id = any(array[u.trigger_id]) and g.group_key = any(array[u.group_key]);

-- name: end_groups
-- Removes locked groups of which nothing is left.
delete from trigger_group g
using unnest($1::bigint[], $2::uuid[], $3::text[]) as u(org_id, trigger_id, group_key)
where g.org_id = any(array[u.org_id]) and g.trigger_id = any(array[u.trigger_id]) and g.group_key = any(array[u.group_key]);

-- name: lapsed
-- Locks groups whose time has come, earliest first, each with its trigger, if that still is there.
select g.org_id, g.trigger_id, g.group_key, g.events, g.dropped, g.first_at, g.due_at, clock_timestamp() as now,
       t.name, t.flow, t.version, t.queue, t.priority, t.labels, t.mode, t.last_error, t.is_paused, t.created_by, t.changed_by
from trigger_group g
left join trigger t on t.org_id = any(array[g.org_id]) and t.trigger_id = any(array[g.trigger_id])
where g.due_at <= clock_timestamp()
  and not exists (select from org o where o.org_id = g.org_id and o.suspended_at is not null offset 0)
  and ($2::text is null or g.trigger_id = $3::uuid and g.group_key = $2)
order by g.due_at limit $1
for update of g skip locked;

-- name: senders
-- Who sent events.
select u.org_id, u.event_id, e.sent_by
from unnest($1::bigint[], $2::text[]) as u(org_id, event_id)
join inbound_event e on e.org_id = any(array[u.org_id]) and e.event_id = any(array[u.event_id]);

-- name: due_groups
-- Names groups whose time has come, earliest first, each with how many events end with it.
select org_id, trigger_id, group_key, json_array_length(events) + dropped as events from trigger_group g
where due_at <= clock_timestamp()
  and not exists (select from org o where o.org_id = g.org_id and o.suspended_at is not null)
order by due_at limit $1;

-- name: park_groups
-- Puts locked groups of paused triggers off for a while; the end of the pause, if not seen here, makes them due earlier.
update trigger_group g set due_at = clock_timestamp() + interval '30 seconds'
from unnest($1::bigint[], $2::uuid[], $3::text[]) as u(org_id, trigger_id, group_key)
where g.org_id = any(array[u.org_id]) and g.trigger_id = any(array[u.trigger_id]) and g.group_key = any(array[u.group_key]);

-- name: note
-- Adds to the counts of dropped events, and notes how the last start went where that is new; in one order for all.
with u as materialized (
  select * from unnest($1::bigint[], $2::uuid[], $3::bigint[], $4::text[]) as u(org_id, trigger_id, dropped, last_error)
),
l as materialized (
  select t.org_id, t.trigger_id from u join trigger t on t.org_id = any(array[u.org_id])
    and t.trigger_id = any(array[u.trigger_id])
  order by t.org_id, t.trigger_id for update of t
)
update trigger t set dropped = t.dropped + u.dropped, last_error = u.last_error
from u join l using (org_id, trigger_id)
where t.org_id = any(array[u.org_id]) and t.trigger_id = any(array[u.trigger_id]);

-- name: add_runs
-- Tells of events which runs they started; in one order for all.
with u as materialized (
  select * from unnest($1::bigint[], $2::text[], $3::text[]) as u(org_id, event_id, runs)
),
l as materialized (
  select e.org_id, e.event_id from u join inbound_event e on e.org_id = any(array[u.org_id])
    and e.event_id = any(array[u.event_id])
  order by e.org_id, e.event_id for update of e
)
update inbound_event e set runs = (e.runs::jsonb || u.runs::jsonb)::json
from u join l using (org_id, event_id)
where e.org_id = any(array[u.org_id]) and e.event_id = any(array[u.event_id]);

-- name: page
-- One page of received events, newest first: before the event $2, or after the event $3; $4 how many, $5 a name.
with a as (select received_at, event_id from inbound_event where org_id = $1 and event_id = $2),
b as (select received_at, event_id from inbound_event where org_id = $1 and event_id = $3)
(select event_id, name, data, sent_by, runs, received_at from inbound_event e
 where org_id = $1 and $3::text is null and ($5::text is null or name = $5)
   and ($2::text is null or (received_at, event_id) < (select received_at, event_id from a))
 order by received_at desc, event_id desc limit $4)
union all
(select event_id, name, data, sent_by, runs, received_at from inbound_event e
 where org_id = $1 and $3::text is not null and ($5::text is null or name = $5)
   and (received_at, event_id) > (select received_at, event_id from b)
 order by received_at, event_id limit $4);
