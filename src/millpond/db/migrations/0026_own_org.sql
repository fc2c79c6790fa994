-- An org's transaction sees and changes its own org alone, and nothing there that is the platform's to decide.

-- Features by name, of a plan and of an org instead of its plan: what is not named is on.
alter table plan add column features jsonb not null default '{}' check (jsonb_typeof(features) = 'object');
alter table org add column features jsonb not null default '{}' check (jsonb_typeof(features) = 'object');

alter table org enable row level security;
alter table org force row level security;
-- A forgotten WHERE touches one org at most, unless no org is set: so the platform works, and whoever looks for an org.
create policy org_scope on org to millpond_app
  using (org_id = nullif(current_setting('millpond.org', true), '')::bigint
         or nullif(current_setting('millpond.org', true), '') is null)
  with check (org_id = nullif(current_setting('millpond.org', true), '')::bigint
              or nullif(current_setting('millpond.org', true), '') is null);
create policy new_org on org as restrictive for insert to millpond_app
  with check (nullif(current_setting('millpond.org', true), '') is null);
create policy all_read on org for select to millpond_engine, millpond_directory, millpond_rights using (true);
revoke update on org from millpond_app;
grant update (name, suspended_at, suspended_reason, plan, overrides, features, plan_changed_at)
  on org to millpond_app;

-- Refuses a statement in an org's transaction that is for the platform.
create function of_platform() returns trigger
  language plpgsql
  set search_path = millpond, pg_temp
as $$
begin
  if nullif(current_setting('millpond.org', true), '') is not null then
    raise exception '% is changed where no org is set', tg_table_name using errcode = 'insufficient_privilege';
  end if;
  return null;
end
$$;
revoke all on function of_platform() from public;
-- An org names itself; how much it may, and whether at all, is decided by the platform.
create trigger of_platform before update of suspended_at, suspended_reason, plan, overrides, features, plan_changed_at on org
  for each statement execute function of_platform();
-- Accounts are of no org: who is an operator, and with which password, no org's transaction changes. It reads them, and
-- locks them to share.
create trigger of_platform before insert or update or delete on account
  for each statement execute function of_platform();

alter table queue_pause enable row level security;
create policy platform_write on queue_pause to millpond_app
  using (nullif(current_setting('millpond.org', true), '') is null)
  with check (nullif(current_setting('millpond.org', true), '') is null);
create policy all_read on queue_pause for select to millpond_app, millpond_engine using (true);

-- As migration 0009 made it, but that it takes a step per org that has marks, however many marks there are.
create or replace function orgs_with_unsealed() returns table (org_id bigint)
  language sql stable security definer rows 10
  set search_path = millpond, pg_temp
as $$
  with recursive o as (
    (select u.org_id from audit_unsealed u order by u.org_id limit 1)
    union all
    select (select u.org_id from audit_unsealed u where u.org_id > o.org_id order by u.org_id limit 1)
    from o where o.org_id is not null
  )
  select o.org_id from o where o.org_id is not null
$$;
do $$
declare hot text;
begin
  foreach hot in array array['audit_unsealed', 'platform_audit_unsealed'] loop
    execute format('alter table %I set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
      autovacuum_vacuum_cost_delay = 0, autovacuum_vacuum_insert_scale_factor = 0.2,
      autovacuum_analyze_scale_factor = 0.2)', hot);
  end loop;
end $$;
