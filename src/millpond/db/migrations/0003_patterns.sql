-- The engine complete: steps in other queues, children, signals, deadlines, deduplication, payloads, pauses, schedules,
-- triggers, deferred chores. It came before the first release: workers of older commits do not work beside it.

-- Run: whose child, rerun or successor it is, when it has to be over, which live key it holds. An input above 256 KiB is
-- null here and stands in payload.
alter table run
  alter column input drop not null,
  add column parent_id uuid,
  add column parent_key text,
  add column close_policy text check (close_policy in ('cancel', 'abandon', 'wait')),
  add column rerun_of uuid,
  add column rerun_from text,
  add column continued_from uuid,
  add column continued_to uuid,
  add column deadline_at timestamptz,
  add column dedup_key text,
  add check ((parent_id is null) = (parent_key is null)),
  add check ((parent_id is null) = (close_policy is null));
-- Each page keeps room for the second version of every row on it, since rows of one page are claimed and ended together:
-- then no update needs a new entry in an index (HOT).
alter table run set (fillfactor = 60);
alter table item set (fillfactor = 45);
create index run_by_parent on run (org_id, parent_id, run_id) where parent_id is not null;
create index run_by_origin on run (org_id, rerun_of, run_id) where rerun_of is not null;

-- Work item: `duties` is what its end has to see to, a set of bits (engine/duties.py); 0 for most, which end fast.
-- `step_key`, `queue` and `capability` are set for a step that executes in another queue than its run.
-- `blocked` is why a run stands still until a person resumes it, such as a history that its code does not match.
-- `overdue`: it was asked to stop because its deadline passed, so that it ends as failed, not as cancelled.
alter table item
  add column duties smallint not null default 0,
  add column step_key text,
  add column queue text,
  add column capability text,
  add column blocked json,
  add column overdue boolean not null default false,
  add check ((kind = 'step') = (step_key is not null));
create index item_of_run on item (org_id, run_id) where kind = 'step';

-- Work that is executed alone, since workers died under it: rare, and looked for every second.
create index arrival_alone on arrival (queue) where lane_id & 2 = 2;
create index lane_alone on lane (queue) where active and lane_id & 2 = 2;

-- Step: `seq` is its place in its branch, counted from 0; `ref` the child run, question or work item that it waits for;
-- `input` its arguments where another worker executes it; `begun` and `unknown` are states of `once` effects.
alter table step
  add column seq integer,
  add column effect text check (effect in ('pure', 'idempotent', 'once')),
  add column ref uuid,
  add column input json,
  drop constraint step_kind_check,
  add constraint step_kind_check check (kind in
    ('step', 'sleep', 'input', 'emit', 'value', 'state', 'child', 'join', 'signal', 'ending')),
  drop constraint step_state_check,
  add constraint step_state_check check (state in ('done', 'failed', 'waiting', 'retrying', 'begun', 'unknown'));
create index step_by_ref on step (org_id, run_id, ref) where ref is not null and state in ('waiting', 'unknown');

-- What ends a wait for a signal, and what ends a run that is over its time (step_key '!deadline').
alter table timer
  drop constraint timer_kind_check,
  add constraint timer_kind_check check (kind in ('start', 'sleep', 'retry', 'expiry', 'deadline', 'signal'));
create index timer_deadline on timer (due_at) where kind = 'deadline';

-- A question about the outcome of a `once` step is of another kind than one that the flow asks; after an answer of
-- `not_done` the same step may ask again, so that only the open question of a step is unique.
alter table input_request
  add column kind text not null default 'question' check (kind in ('question', 'outcome')),
  drop constraint input_request_org_id_run_id_step_key_key;
create unique index input_request_open on input_request (org_id, run_id, step_key) where state = 'pending';
create index input_request_of_run on input_request (org_id, run_id);

-- What workers can run: with which labels, and by when a run has to
-- be over. Of a worker: its release, when its heartbeat last came, and the slots in use by queue as it told itself.
alter table flow_version
  add column labels json not null default '{}',
  add column deadline_s double precision check (deadline_s > 0);
alter table worker
  add column labels json not null default '{}',
  add column release text not null default '',
  add column beat_at timestamptz not null default clock_timestamp(),
  add column in_use json not null default '{}';

-- What was answered, where that does not follow from the run alone: a batch, or a run that was joined.
alter table idempotency
  add column answer json;

-- JSON above 256 KiB of runs: inputs ('input'), outputs ('output'), results of steps ('step:' and the step's key), and
-- arguments of steps in other queues ('args:' and the key).
create table payload (
  org_id bigint not null,
  run_id uuid not null,
  slot text not null,
  body json not null,
  created_at timestamptz not null default clock_timestamp(),
  primary key (org_id, run_id, slot)
);

-- What was sent to a run, in order; a wait consumes the first of its name.
create table signal (
  org_id bigint not null,
  run_id uuid not null,
  signal_id uuid not null,
  name text not null check (length(name) between 1 and 200),
  data json not null default 'null',
  sent_by text not null,
  step_key text,
  created_at timestamptz not null default clock_timestamp(),
  primary key (org_id, run_id, signal_id)
);
create index signal_waiting on signal (org_id, run_id, name, signal_id) where step_key is null;

-- Keys of which only one run is live at a time.
create table live_key (
  org_id bigint not null,
  key text not null check (length(key) between 1 and 255),
  run_id uuid not null,
  primary key (org_id, key)
);
create index live_key_of_run on live_key (org_id, run_id);

-- What an org has paused: a queue, a flow, or ('' and '') all of its work.
create table pause (
  org_id bigint not null,
  queue text not null default '',
  flow text not null default '',
  paused_by text not null,
  reason text not null default '',
  paused_at timestamptz not null default clock_timestamp(),
  primary key (org_id, queue, flow)
);

-- Queues that stand still for every org. Global.
create table queue_pause (
  queue text primary key,
  paused_by text not null,
  reason text not null default '',
  paused_at timestamptz not null default clock_timestamp()
);

-- Runs at times of a calendar, in a time zone.
create table schedule (
  org_id bigint not null,
  schedule_id uuid not null,
  name text not null check (length(name) between 1 and 200),
  flow text not null,
  version integer,
  queue text,
  input json not null default 'null',
  priority integer not null default 0 check (priority between -100 and 100),
  labels json not null default '{}',
  cron text not null,
  time_zone text not null default 'UTC',
  missed text not null default 'one' check (missed in ('skip', 'one', 'all')),
  overlap text not null default 'allow' check (overlap in ('allow', 'skip', 'cancel_old')),
  is_paused boolean not null default false,
  next_due_at timestamptz,
  last_due_at timestamptz,
  last_run_id uuid,
  last_error text,
  created_by text not null,
  created_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp(),
  primary key (org_id, schedule_id),
  unique (org_id, name)
);
create index schedule_due on schedule (next_due_at) where not is_paused and next_due_at is not null;

-- Flows that start when an event of a name arrives. `filter` is a JSON schema that the event's data has to satisfy;
-- `group_by` a path in the data, such as customer.id: each of its values is debounced, throttled or gathered for itself.
-- `dropped` counts events that matched and got no run: throttled, or overtaken while debounced.
create table trigger (
  org_id bigint not null,
  trigger_id uuid not null,
  name text not null check (length(name) between 1 and 200),
  event text not null check (length(event) between 1 and 200),
  filter json,
  flow text not null,
  version integer,
  queue text,
  priority integer not null default 0 check (priority between -100 and 100),
  labels json not null default '{}',
  mode text not null default 'each' check (mode in ('each', 'debounce', 'throttle', 'batch')),
  group_by text,
  period_s double precision check (period_s > 0),
  max_wait_s double precision check (max_wait_s > 0),
  max_count integer check (max_count between 1 and 1000),
  is_paused boolean not null default false,
  dropped bigint not null default 0,
  last_error text,
  created_by text not null,
  created_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp(),
  primary key (org_id, trigger_id),
  unique (org_id, name)
);
create index trigger_by_event on trigger (org_id, event) where not is_paused;

-- Events that wait for their trigger's quiet time, period or number, by group. Without events it is the period of a
-- throttle. `dropped` is added to the trigger's when the group ends.
create table trigger_group (
  org_id bigint not null,
  trigger_id uuid not null,
  group_key text not null,
  events json not null default '[]',
  dropped integer not null default 0,
  first_at timestamptz not null default clock_timestamp(),
  due_at timestamptz,
  primary key (org_id, trigger_id, group_key)
);
create index trigger_group_due on trigger_group (due_at) where due_at is not null;

-- Received events, by the id that their sender gave them or that they were given; a repeated id is received once.
create table inbound_event (
  org_id bigint not null,
  event_id text not null check (length(event_id) between 1 and 255),
  name text not null,
  data json not null,
  sent_by text not null,
  runs json not null default '[]',
  received_at timestamptz not null default clock_timestamp(),
  primary key (org_id, event_id)
);
create index inbound_event_age on inbound_event (received_at);
create index inbound_event_recent on inbound_event (org_id, received_at, event_id);

-- What the engine does to a run right after the change that asked for it, in a transaction of its own, so that locks are
-- never taken from a parent down to its children.
create table chore (
  org_id bigint not null,
  chore_id bigint generated always as identity,
  kind text not null check (kind in ('cancel')),
  run_id uuid not null,
  asked_by text not null,
  reason text not null default '',
  created_at timestamptz not null default clock_timestamp(),
  primary key (org_id, chore_id)
);

-- How far retention has come in each org: runs before this id were looked at in this pass.
create table retention (
  org_id bigint not null,
  cursor_id uuid not null,
  pass_began_at timestamptz not null default clock_timestamp(),
  primary key (org_id)
);

do $$
declare tenant text;
begin
  foreach tenant in array array['payload', 'signal', 'live_key', 'pause', 'schedule', 'trigger', 'trigger_group',
                                'inbound_event', 'chore', 'retention'] loop
    execute format('alter table %I enable row level security', tenant);
    execute format('alter table %I force row level security', tenant);
    execute format('create policy org_scope on %I to millpond_app
      using (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)
      with check (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)', tenant);
    execute format('create policy engine_duty on %I to millpond_engine using (true) with check (true)', tenant);
    execute format('grant select, insert, update, delete on %I to millpond_engine', tenant);
  end loop;
  foreach tenant in array array['signal', 'live_key', 'chore', 'trigger_group'] loop
    execute format('alter table %I set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
      autovacuum_vacuum_cost_delay = 0)', tenant);
  end loop;
end $$;

-- Retention deletes old keys of requests too, the oldest first.
create index idempotency_age on idempotency (created_at);
create policy engine_duty on idempotency to millpond_engine using (true) with check (true);
grant select, delete on idempotency to millpond_engine;

grant select, insert on payload, signal, chore, inbound_event to millpond_app;
grant update (step_key) on signal to millpond_app;
grant select, insert, delete on live_key, pause to millpond_app;
grant update (run_id, answer), delete on idempotency to millpond_app;
grant select, insert, update, delete on schedule, trigger, trigger_group to millpond_app;
grant update (runs) on inbound_event to millpond_app;
grant select, insert, delete on queue_pause to millpond_app;
grant select on queue_pause to millpond_engine;
-- Reruns copy recorded steps; a decision on a `once` step's outcome lets it be tried again.
grant insert on step to millpond_app;
grant update (tries) on step to millpond_app;

-- The first half of a claim: makes this the one claim of the shard until commit, turns arrivals into active lanes and shares,
-- and reads the orgs first in fair order with their lanes that the worker can serve and the heads of those. One call is one
-- round trip, yet each statement of it reads after the lock. The first row tells, in place of a lane, how many arrivals
-- were consumed (lane_id) and whether the worker's session stands (offset_us 1 or 0).
create function claim_heads(most integer, worker uuid, queues text[], orgs integer[], able text[], depth integer)
  returns table (queue text, org_id bigint, weight float8, virtual_s float8, lane_id bigint, offset_us bigint,
                 capability text, ranks bigint[], items uuid[])
  language plpgsql volatile rows 200
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  has_pauses boolean;
begin
  perform pg_advisory_xact_lock(7741001);
  return query
  with a as (
    delete from arrival where (org_id, arrival_id) in (select org_id, arrival_id from arrival limit most)
    returning org_id, lane_id, queue, capability, keys, offset_us, min_rank
  ),
  g as materialized (
    select org_id, lane_id, queue, capability, keys, offset_us, min(min_rank) as min_rank
    from a group by org_id, lane_id, queue, capability, keys, offset_us
  ),
  lanes as (
    insert into lane (org_id, lane_id, queue, capability, keys, offset_us, cursor_rank, active)
    select org_id, lane_id, queue, capability, keys, offset_us, min_rank, true from g
    on conflict (org_id, lane_id) do update
      set active = true, cursor_rank = least(lane.cursor_rank, excluded.cursor_rank)
      where not lane.active or excluded.cursor_rank < lane.cursor_rank
  ),
  shares as (
    insert into share (org_id, queue, virtual_s, active)
    select d.org_id, d.queue, coalesce(c.virtual_s, 0), true
    from (select distinct org_id, queue from g) d left join fair_clock c on c.queue = d.queue
    on conflict (org_id, queue) do update
      set active = true, virtual_s = greatest(share.virtual_s, excluded.virtual_s)
      where not share.active
  )
  select '', 0::bigint, 0::float8, 0::float8, (select count(*) from a),
         (exists (select from worker w where w.worker_id = claim_heads.worker))::int::bigint, '', null::bigint[],
         null::uuid[];
  has_pauses := exists (select from pause) or exists (select from queue_pause);
  if has_pauses then
    -- Orgs whose every lane in a queue is paused leave the fair order, without credit for that time: a resume brings them
    -- back by arrivals. One that is under way would not see the lanes made here, so what it lifts is left as it is.
    with c as materialized (
      select s.org_id, s.queue from share s
      where s.queue = any(queues) and s.active
        and exists (select from pause z where z.org_id = s.org_id and z.queue in ('', s.queue))
        and not exists (
          select from lane l where l.org_id = s.org_id and l.queue = s.queue and l.active
            and not exists (select from pause z
                            where z.org_id = l.org_id and z.queue in ('', l.queue)
                              and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))))
    ),
    held as materialized (
      select z.org_id, z.queue, z.flow from pause z
      where z.org_id in (select org_id from c) for key share skip locked
    )
    update share s set active = false from c
    where s.org_id = c.org_id and s.queue = c.queue
      and not exists (
        select from lane l where l.org_id = s.org_id and l.queue = s.queue and l.active
          and not exists (select from held z
                          where z.org_id = l.org_id and z.queue in ('', l.queue)
                            and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))));
  end if;
  return query
  select s.queue, s.org_id, s.weight, s.virtual_s, l.lane_id, l.offset_us, l.capability, h.ranks, h.items
  from (
    select u.queue, u.orgs from unnest(queues, orgs) as u(queue, orgs)
    where not has_pauses or not exists (select from queue_pause z where z.queue = u.queue)
  ) q
  cross join lateral (
    select s.queue, s.org_id, s.weight, s.virtual_s
    from share s
    where s.queue = q.queue and s.active
      and exists (select from lane l
                  where l.org_id = s.org_id and l.queue = s.queue and l.active and l.capability = any(able)
                  and (not has_pauses or not exists (
                    select from pause z
                    where z.org_id = l.org_id and z.queue in ('', l.queue)
                      and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!')))))
    order by s.virtual_s, s.org_id limit q.orgs
  ) s
  cross join lateral (
    select l.lane_id, l.offset_us, l.capability, l.cursor_rank
    from lane l
    where l.org_id = s.org_id and l.queue = s.queue and l.active and l.capability = any(able)
      and (not has_pauses or not exists (
        select from pause z
        where z.org_id = l.org_id and z.queue in ('', l.queue)
          and (z.flow = '' or z.flow || '@' = rtrim(l.capability, '0123456789!'))))
    order by l.cursor_rank + l.offset_us limit 64
  ) l
  left join lateral (
    select array_agg(r.rank order by r.rank, r.item_id) as ranks, array_agg(r.item_id order by r.rank, r.item_id) as items
    from (select r.rank, r.item_id from ready r
          where r.org_id = s.org_id and r.lane_id = l.lane_id and r.rank >= l.cursor_rank
          order by r.rank, r.item_id limit depth) r
  ) h on true;
end
$$;
