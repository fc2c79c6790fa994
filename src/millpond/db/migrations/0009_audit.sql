-- The chain over the audit log: a seal per row, its place given when it is sealed, so that late commits disturb no order.

create table audit_seal (
  org_id bigint not null,
  seq bigint not null check (seq > 0),
  audit_id uuid not null,
  mac bytea not null check (length(mac) = 32),
  key_id text not null,
  sealed_at timestamptz not null,
  primary key (org_id, seq),
  unique (org_id, audit_id)
);

-- Rows that no seal covers yet: marked by the transaction that tells, unmarked by the one that seals.
create table audit_unsealed (
  org_id bigint not null,
  audit_id uuid not null,
  primary key (org_id, audit_id)
);

-- The same of the platform's own log. Global.
create table platform_audit_seal (
  seq bigint primary key check (seq > 0),
  audit_id uuid not null unique,
  mac bytea not null check (length(mac) = 32),
  key_id text not null,
  sealed_at timestamptz not null
);
create table platform_audit_unsealed (
  audit_id uuid primary key
);

create index audit_of_subject on audit (org_id, subject, audit_id);
create index audit_of_resource on audit (org_id, resource, audit_id);
create index audit_of_run on audit (org_id, run_id, audit_id) where run_id is not null;

-- What was told before there was a sealer. The owner is bound by policies too where they are forced.
alter table audit no force row level security;
insert into audit_unsealed (org_id, audit_id) select org_id, audit_id from audit;
alter table audit force row level security;
insert into platform_audit_unsealed (audit_id) select audit_id from platform_audit;

create function mark_unsealed() returns trigger
  language plpgsql
  set search_path = millpond, pg_temp
as $$
begin
  insert into audit_unsealed (org_id, audit_id) values (new.org_id, new.audit_id);
  return null;
end
$$;
create trigger mark_unsealed after insert on audit for each row execute function mark_unsealed();

create function mark_platform_unsealed() returns trigger
  language plpgsql
  set search_path = millpond, pg_temp
as $$
begin
  insert into platform_audit_unsealed (audit_id) values (new.audit_id);
  return null;
end
$$;
create trigger mark_unsealed after insert on platform_audit
  for each row execute function mark_platform_unsealed();

do $$
declare tenant text;
begin
  foreach tenant in array array['audit_seal', 'audit_unsealed'] loop
    execute format('alter table %I enable row level security', tenant);
    execute format('alter table %I force row level security', tenant);
    execute format('create policy org_scope on %I to millpond_app
      using (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)
      with check (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)', tenant);
  end loop;
end $$;

grant select, insert on audit_seal, platform_audit_seal to millpond_app;
grant select, insert, delete on audit_unsealed, platform_audit_unsealed to millpond_app;
-- The engine's rows are marked as all others; it reads no marks.
create policy engine_duty on audit_unsealed for insert to millpond_engine with check (true);
grant insert on audit_unsealed to millpond_engine;

-- Which orgs have rows to be sealed. The one look at marks across orgs: it runs as a role that reads whose they are and
-- nothing else, that nobody can log in as.
do $$
begin
  if not exists (select from pg_roles where rolname = 'millpond_sealer') then
    begin
      create role millpond_sealer nologin;
    exception when duplicate_object or unique_violation then null;
    end;
  end if;
  if not pg_has_role(current_user, 'millpond_sealer',
                     case when current_setting('server_version_num')::int >= 160000 then 'set' else 'member' end) then
    execute format('grant millpond_sealer to %I', current_user);
  end if;
  execute format('grant usage, create on schema %I to millpond_sealer', current_schema());
end $$;
create policy sealer on audit_unsealed for select to millpond_sealer using (true);
grant select (org_id) on audit_unsealed to millpond_sealer;

create function orgs_with_unsealed() returns table (org_id bigint)
  language sql stable security definer rows 10
  set search_path = millpond, pg_temp
as $$
  select distinct u.org_id from audit_unsealed u
$$;
alter function orgs_with_unsealed() owner to millpond_sealer;
revoke all on function orgs_with_unsealed() from public;
grant execute on function orgs_with_unsealed() to millpond_app;
do $$
begin
  execute format('revoke create on schema %I from millpond_sealer', current_schema());
end $$;
