-- Plans, quotas, requests per second, prices of models, usage.

-- What operators sell: limits by name; a name that is absent has no limit. Global.
create table plan (
  plan text primary key check (plan ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
  title text not null default '' check (length(title) <= 200),
  limits jsonb not null default '{}' check (jsonb_typeof(limits) = 'object'),
  is_default boolean not null default false,
  changed_at timestamptz not null default clock_timestamp()
);
create unique index plan_default on plan (is_default) where is_default;
insert into plan (plan, title, is_default) values ('unlimited', 'No limits', true);

-- An org's plan (unset: the default one) and what it has instead of its plan's limits; null there lifts a limit.
alter table org
  add column plan text references plan (plan),
  add column overrides jsonb not null default '{}' check (jsonb_typeof(overrides) = 'object'),
  add column plan_changed_at timestamptz;
create index org_plan_changed on org (plan_changed_at) where plan_changed_at is not null;

-- What an org has taken of a quota in a period: what was spent, and blocks that processes hold. Changed once per block.
create table quota_count (
  org_id bigint not null,
  quota text not null,
  starts_at timestamptz not null,
  ends_at timestamptz not null,
  taken bigint not null default 0 check (taken >= 0),
  primary key (org_id, quota, starts_at)
) with (fillfactor = 50);

-- A part of a quota that one process may spend. Whoever spends of it holds it by a key-share lock until the commit; whoever
-- takes back what is left of it locks it for update first, so that neither counts what the other does not see.
create table quota_block (
  org_id bigint not null,
  block_id uuid not null,
  quota text not null,
  starts_at timestamptz not null,
  ends_at timestamptz not null,
  size bigint not null check (size > 0),
  primary key (org_id, block_id)
);
create index quota_block_of on quota_block (org_id, quota, starts_at);

-- What was spent of blocks: one row per transaction, inserted with what it pays for, gone with its block.
create table quota_spend (
  org_id bigint not null,
  spend_id bigint generated always as identity,
  block_id uuid not null,
  amount bigint not null check (amount > 0),
  primary key (org_id, spend_id)
);
create index quota_spend_of on quota_spend (org_id, block_id);

-- What a model costs, in millionths of the currency per million tokens. Global.
create table model_price (
  model text primary key check (length(model) between 1 and 200),
  input_micros bigint not null check (input_micros >= 0),
  output_micros bigint not null check (output_micros >= 0),
  changed_at timestamptz not null default clock_timestamp()
);

-- What one transaction of a worker used, of any number of orgs; the parts at one place of the arrays belong together. Written
-- with what it tells of, folded into days and removed within seconds. Global: the engine's alone.
create table usage_part (
  part_id uuid primary key default gen_random_uuid(),
  at timestamptz not null default clock_timestamp(),
  orgs bigint[] not null,
  flows text[] not null,
  models text[],
  runs integer[],
  worker_s double precision[],
  input_tokens bigint[],
  output_tokens bigint[],
  cost_micros bigint[]
);

-- What an org used on a day (UTC), by flow and model; model '' is the work of its runs themselves.
create table usage_day (
  org_id bigint not null,
  day date not null,
  flow text not null,
  model text not null,
  runs bigint not null default 0,
  worker_s double precision not null default 0,
  input_tokens bigint not null default 0,
  output_tokens bigint not null default 0,
  cost_micros bigint not null default 0,
  primary key (org_id, day, flow, model)
) with (fillfactor = 70);

-- Requests that an org, or a key, may still make: a bucket that fills by itself. Lost in a crash, and full again then. Global.
create unlogged table rate_bucket (
  bucket text primary key,
  tokens double precision not null,
  at timestamptz not null default clock_timestamp()
) with (fillfactor = 50);

do $$
declare hot text;
begin
  foreach hot in array array['quota_count', 'quota_block', 'quota_spend', 'usage_part', 'rate_bucket'] loop
    execute format('alter table %I set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
      autovacuum_vacuum_cost_delay = 0, autovacuum_vacuum_insert_scale_factor = 0.2,
      autovacuum_analyze_scale_factor = 0.2)', hot);
  end loop;
end $$;

do $$
declare tenant text;
begin
  foreach tenant in array array['quota_count', 'quota_block', 'quota_spend', 'usage_day'] loop
    execute format('alter table %I enable row level security', tenant);
    execute format('alter table %I force row level security', tenant);
    execute format('create policy org_scope on %I to millpond_app
      using (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)
      with check (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)', tenant);
    execute format('create policy engine_duty on %I to millpond_engine using (true) with check (true)', tenant);
  end loop;
end $$;

-- What is of the platform is changed by transactions without an org alone; all read it.
do $$
declare shared text;
begin
  foreach shared in array array['plan', 'model_price', 'rate_bucket'] loop
    execute format('alter table %I enable row level security', shared);
    execute format('create policy platform_write on %I to millpond_app
      using (nullif(current_setting(''millpond.org'', true), '''') is null)
      with check (nullif(current_setting(''millpond.org'', true), '''') is null)', shared);
    execute format('create policy all_read on %I for select to millpond_app, millpond_engine using (true)', shared);
  end loop;
end $$;

grant select, insert, update, delete on plan, model_price to millpond_app;
grant select on plan, model_price to millpond_engine;
grant select, insert, update on quota_count to millpond_app, millpond_engine;
grant delete on quota_count to millpond_engine;
grant select, insert, delete, update (size) on quota_block to millpond_app, millpond_engine;
grant select, insert, delete on quota_spend to millpond_app, millpond_engine;
grant select, insert, update, delete on usage_part to millpond_engine;
grant select on usage_day to millpond_app;
grant select, insert, update on usage_day to millpond_engine;
grant select, insert, update, delete on rate_bucket to millpond_app;
