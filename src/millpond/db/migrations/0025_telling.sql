-- What a step writes while it goes on, such as a model's words, in pieces: beside the numbered events, gone soon after the
-- step's record, which holds the whole. `item_id` and `attempt` name the lease it was written under; `n` counts per try.
create table delta (
  org_id bigint not null,
  run_id uuid not null,
  step_key text not null,
  attempt integer not null,
  tries integer not null,
  n integer not null,
  item_id uuid not null,
  text text not null,
  at timestamptz not null default clock_timestamp(),
  primary key (org_id, run_id, step_key, attempt, tries, n)
);
alter table delta set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0,
  autovacuum_vacuum_insert_scale_factor = 0.2, autovacuum_analyze_scale_factor = 0.2);
alter table delta enable row level security;
alter table delta force row level security;
create policy org_scope on delta to millpond_app
  using (org_id = nullif(current_setting('millpond.org', true), '')::bigint)
  with check (org_id = nullif(current_setting('millpond.org', true), '')::bigint);
create policy engine_duty on delta to millpond_engine using (true) with check (true);
grant select on delta to millpond_app;
grant select, insert, delete on delta to millpond_engine;

-- The transaction that stored an event: all runs' events in an order in which a reader who stays below the oldest running
-- transaction misses nothing. Events from before this migration have none and are not part of that sequence.
alter table event add column xid xid8;
alter table event alter column xid set default pg_current_xact_id();
create index event_of_org on event (org_id, xid) where xid is not null;
