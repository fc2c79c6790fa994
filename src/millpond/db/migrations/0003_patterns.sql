-- The engine complete: steps in other queues, children, signals, deadlines, deduplication, payloads, pauses, schedules,
-- triggers, deferred chores. Additive, so that workers of the previous release go on beside it.

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
  add column payload_bytes integer,
  add check ((parent_id is null) = (parent_key is null)),
  add check ((parent_id is null) = (close_policy is null));
create index run_by_parent on run (org_id, parent_id, run_id) where parent_id is not null;
create index run_by_origin on run (org_id, rerun_of, run_id) where rerun_of is not null;

-- Work item: `duties` is what its end has to see to, a set of bits (engine/duties.py); 0 for most, which end fast.
-- `step_key`, `queue` and `capability` are set for a step that executes in another queue than its run.
-- `blocked` is why a run stands still until a person resumes it, such as a history that its code does not match.
alter table item
  add column duties smallint not null default 0,
  add column step_key text,
  add column queue text,
  add column capability text,
  add column blocked json,
  add check ((kind = 'step') = (step_key is not null));
create index item_of_run on item (org_id, run_id) where kind = 'step';

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

-- A question about the outcome of a `once` step is of another kind than one that the flow asks.
alter table input_request
  add column kind text not null default 'question' check (kind in ('question', 'outcome'));

-- What workers can run: with which labels, and whether a cancelled run still has something to do.
alter table flow_version
  add column labels json not null default '{}',
  add column has_ending boolean not null default false;
alter table worker
  add column labels json not null default '{}',
  add column release text not null default '';

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
  created_by text not null,
  created_at timestamptz not null default clock_timestamp(),
  primary key (org_id, trigger_id),
  unique (org_id, name)
);
create index trigger_by_event on trigger (org_id, event) where not is_paused;

-- Events that wait for their trigger's quiet time, period or number, by group.
create table trigger_group (
  org_id bigint not null,
  trigger_id uuid not null,
  group_key text not null,
  events json not null default '[]',
  event_count integer not null default 0,
  first_at timestamptz not null default clock_timestamp(),
  fired_at timestamptz,
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

-- Retention deletes old keys of requests too.
create policy engine_duty on idempotency to millpond_engine using (true) with check (true);
grant select, delete on idempotency to millpond_engine;

grant select, insert on payload, signal, chore, inbound_event to millpond_app;
grant select, insert, delete on live_key, pause to millpond_app;
grant select, insert, update, delete on schedule, trigger, trigger_group to millpond_app;
grant update (runs) on inbound_event to millpond_app;
grant select, insert, delete on queue_pause to millpond_app;
grant select on queue_pause to millpond_engine;
-- Reruns copy recorded steps; a decision on a `once` step's outcome lets it be tried again.
grant insert on step to millpond_app;
grant update (tries) on step to millpond_app;
