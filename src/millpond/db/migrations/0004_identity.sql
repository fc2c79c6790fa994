-- Identity: people, their sessions, memberships and roles, service principals, API keys, grants, and the audit log.
-- `version` grows with every change of what somebody may: what was signed for an older one is refused, without a cache.

alter table org add column suspended_at timestamptz, add column suspended_reason text;

-- People. Global: one may be in several orgs. `version` is of what holds in every org: the operator's right, the password.
create table account (
  user_id uuid primary key,
  email text not null unique check (email = lower(email) and length(email) between 3 and 254),
  name text not null default '' check (length(name) <= 200),
  password_hash text,
  is_operator boolean not null default false,
  version integer not null default 1,
  created_at timestamptz not null default clock_timestamp(),
  disabled_at timestamptz
);

-- A signed-in device. Global.
create table login_session (
  session_id uuid primary key,
  user_id uuid not null references account (user_id) on delete cascade,
  address text,
  agent text,
  created_at timestamptz not null default clock_timestamp(),
  used_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  revoked_at timestamptz,
  revoked_why text,
  check ((revoked_at is null) = (revoked_why is null))
);
create index login_session_of_user on login_session (user_id, created_at desc);

-- Sets of permissions that an org named itself; the built-in roles are in code.
create table custom_role (
  org_id bigint not null references org (org_id),
  role text not null check (role ~ '^[a-z][a-z0-9_-]{0,62}$'),
  description text not null default '',
  permissions text[] not null,
  created_at timestamptz not null default clock_timestamp(),
  primary key (org_id, role)
);

-- Who is in an org, with which role (built-in or custom).
create table membership (
  org_id bigint not null references org (org_id),
  user_id uuid not null references account (user_id) on delete cascade,
  role text not null,
  version integer not null default 1,
  added_by text not null,
  created_at timestamptz not null default clock_timestamp(),
  primary key (org_id, user_id)
);
create index membership_of_user on membership (user_id);

-- Programs that act in an org as themselves.
create table service_principal (
  org_id bigint not null references org (org_id),
  service_id uuid not null,
  name text not null check (length(name) between 1 and 200),
  role text not null,
  version integer not null default 1,
  created_by text not null,
  created_at timestamptz not null default clock_timestamp(),
  disabled_at timestamptz,
  primary key (org_id, service_id),
  unique (org_id, name)
);

-- Keys for programs: what they may is their scopes, and no more than their owner (`user:…`, `service:…`) may now.
create table api_key (
  org_id bigint not null references org (org_id),
  key_id uuid not null,
  name text not null check (length(name) between 1 and 200),
  prefix text not null,
  digest bytea not null,
  owner text not null,
  scopes text[] not null,
  created_by text not null,
  created_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz,
  used_at timestamptz,
  revoked_at timestamptz,
  primary key (org_id, key_id),
  unique (org_id, prefix)
);

-- An owner of the org lets a platform operator look at its content for a while.
create table access_grant (
  org_id bigint not null references org (org_id),
  grant_id uuid not null,
  operator_id uuid not null references account (user_id) on delete cascade,
  granted_by text not null,
  reason text not null,
  is_read_only boolean not null default true,
  created_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  ended_at timestamptz,
  primary key (org_id, grant_id)
);

-- Somebody whom another issuer vouches for: known by issuer and subject, never by an email address.
create table outside_identity (
  org_id bigint not null references org (org_id),
  identity_id uuid not null,
  issuer text not null,
  outside_subject text not null,
  label text not null default '',
  role text not null,
  version integer not null default 1,
  first_seen_at timestamptz not null default clock_timestamp(),
  seen_at timestamptz not null default clock_timestamp(),
  disabled_at timestamptz,
  primary key (org_id, identity_id),
  unique (org_id, issuer, outside_subject)
);

-- What was done to what, by whom: inserted in the transaction that it tells of, never changed. A sealer chains rows apart.
create table audit (
  org_id bigint not null,
  audit_id uuid not null,
  at timestamptz not null default clock_timestamp(),
  subject text not null,
  granted_by text,
  action text not null check (action ~ '^[a-z_]+\.[a-z_]+$'),
  resource text not null,
  run_id uuid,
  address text,
  details json not null default '{}',
  primary key (org_id, audit_id)
);

-- The same of the platform itself: orgs, plans, operators. Global.
create table platform_audit (
  audit_id uuid primary key,
  at timestamptz not null default clock_timestamp(),
  subject text not null,
  action text not null check (action ~ '^[a-z_]+\.[a-z_]+$'),
  resource text not null,
  address text,
  details json not null default '{}'
);

do $$
declare tenant text;
begin
  foreach tenant in array array['custom_role', 'membership', 'service_principal', 'api_key', 'access_grant', 'outside_identity',
                                'audit'] loop
    execute format('alter table %I enable row level security', tenant);
    execute format('alter table %I force row level security', tenant);
    execute format('create policy org_scope on %I to millpond_app
      using (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)
      with check (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)', tenant);
  end loop;
end $$;

grant select, insert, update on account, login_session to millpond_app;
grant select, insert, update, delete on custom_role, membership to millpond_app;
grant select, insert, update on service_principal, api_key, access_grant, outside_identity to millpond_app;
grant select, insert on audit, platform_audit to millpond_app;
-- The engine tells of what it refuses a run, and reads nothing.
create policy engine_duty on audit for insert to millpond_engine with check (true);
grant insert on audit to millpond_engine;

-- In which orgs somebody is. The one reader of memberships across orgs: it runs as a role that reads those and nothing else,
-- that nobody can log in as.
do $$
begin
  if not exists (select from pg_roles where rolname = 'millpond_directory') then
    begin
      create role millpond_directory nologin;
    exception when duplicate_object or unique_violation then null;
    end;
  end if;
  if not pg_has_role(current_user, 'millpond_directory',
                     case when current_setting('server_version_num')::int >= 160000 then 'set' else 'member' end) then
    execute format('grant millpond_directory to %I', current_user);
  end if;
  execute format('grant usage, create on schema %I to millpond_directory', current_schema());
end $$;
create policy directory on membership for select to millpond_directory using (true);
create policy directory on custom_role for select to millpond_directory using (true);
grant select (org_id, user_id, role, version, created_at) on membership to millpond_directory;
grant select (org_id, role, permissions) on custom_role to millpond_directory;
grant select (org_id, slug, name, suspended_at) on org to millpond_directory;

create function orgs_of_user(who uuid)
  returns table (org_id bigint, slug text, name text, is_suspended boolean, role text, version integer, permissions text[])
  language sql stable security definer rows 5
  set search_path = millpond, pg_temp
as $$
  select m.org_id, o.slug, o.name, o.suspended_at is not null, m.role, m.version, c.permissions
  from membership m
  join org o on o.org_id = m.org_id
  left join custom_role c on c.org_id = m.org_id and c.role = m.role
  where m.user_id = who
  order by m.created_at, m.org_id
$$;
alter function orgs_of_user(uuid) owner to millpond_directory;
revoke all on function orgs_of_user(uuid) from public;
grant execute on function orgs_of_user(uuid) to millpond_app;
do $$
begin
  execute format('revoke create on schema %I from millpond_directory', current_schema());
end $$;

-- Raises where somebody may no longer act as was signed: part of the statement that opens a transaction for them.
-- `stamp` is the version of what they may: of the membership, the service, the outside identity; of the key's owner for a key;
-- of the account where no org is set. MP401: get a new token; MP403: the org is suspended.
create function refuse_stale(subject text, stamp integer, session uuid, lent uuid) returns void
  language plpgsql stable
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  org bigint := nullif(current_setting('millpond.org', true), '')::bigint;
  kind text := split_part(refuse_stale.subject, ':', 1);
  id uuid := split_part(refuse_stale.subject, ':', 2)::uuid;
  holder text := refuse_stale.subject;
begin
  if org is not null and exists (select from org o where o.org_id = org and o.suspended_at is not null) then
    raise exception 'suspended' using errcode = 'MP403';
  end if;
  if session is not null and not exists (
    select from login_session s
    where s.session_id = session and s.revoked_at is null and s.expires_at > clock_timestamp()
  ) then
    raise exception 'session' using errcode = 'MP401';
  end if;
  if kind = 'key' then
    select k.owner into holder from api_key k
    where k.org_id = org and k.key_id = id and k.revoked_at is null
      and (k.expires_at is null or k.expires_at > clock_timestamp());
    if not found then
      raise exception 'key' using errcode = 'MP401';
    end if;
    kind := split_part(holder, ':', 1);
    id := split_part(holder, ':', 2)::uuid;
  end if;
  if lent is not null then
    if exists (select from access_grant g join account a on a.user_id = g.operator_id
               where g.org_id = org and g.grant_id = lent and g.operator_id = id and g.ended_at is null
                 and g.expires_at > clock_timestamp() and a.is_operator and a.disabled_at is null) then
      return;
    end if;
  elsif kind = 'user' and org is null then
    if exists (select from account a where a.user_id = id and a.version = stamp and a.disabled_at is null) then
      return;
    end if;
  elsif kind = 'user' then
    if exists (select from membership m join account a on a.user_id = m.user_id
               where m.org_id = org and m.user_id = id and m.version = stamp and a.disabled_at is null) then
      return;
    end if;
  elsif kind = 'service' then
    if exists (select from service_principal s
               where s.org_id = org and s.service_id = id and s.version = stamp and s.disabled_at is null) then
      return;
    end if;
  elsif kind = 'outside' then
    if exists (select from outside_identity o
               where o.org_id = org and o.identity_id = id and o.version = stamp and o.disabled_at is null) then
      return;
    end if;
  end if;
  raise exception 'rights' using errcode = 'MP401';
end
$$;
revoke all on function refuse_stale(text, integer, uuid, uuid) from public;
grant execute on function refuse_stale(text, integer, uuid, uuid) to millpond_app;

-- Whom a run acts for: the version of what they might when it was accepted (null: nothing to ask again), the session or grant
-- is not kept, and the permission that starting it took.
alter table run add column stamp integer, add column permission text;
