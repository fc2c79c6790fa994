-- Organizations: what each decides for itself, and who was asked to join.

-- Versions of rights. Never given out twice, so that a token of somebody who left is no token of them when they come back.
create sequence rights_version as integer start 2;
grant usage on sequence rights_version to millpond_app;

-- What an org decides for itself; an org without a row has the defaults.
create table org_policy (
  org_id bigint not null references org (org_id),
  may_resolve_own boolean not null default false,
  invitation_days integer not null default 7 check (invitation_days between 1 and 30),
  email_domains text[] not null default '{}' check (cardinality(email_domains) <= 100),
  updated_at timestamptz not null default clock_timestamp(),
  primary key (org_id)
);

-- Asks an address to join. The token was sent and is not kept; `invited_by` has to be able to give the role at acceptance too.
create table invitation (
  org_id bigint not null references org (org_id),
  invitation_id uuid not null,
  email text not null check (email = lower(email) and length(email) between 3 and 254),
  role text not null,
  digest bytea not null,
  invited_by text not null,
  is_of_platform boolean not null default false,
  created_at timestamptz not null default clock_timestamp(),
  sent_at timestamptz not null default clock_timestamp(),
  expires_at timestamptz not null,
  accepted_at timestamptz,
  accepted_by text,
  revoked_at timestamptz,
  primary key (org_id, invitation_id),
  unique (org_id, digest),
  check ((accepted_at is null) = (accepted_by is null)),
  check (accepted_at is null or revoked_at is null)
);
create unique index invitation_open on invitation (org_id, email) where accepted_at is null and revoked_at is null;

do $$
declare tenant text;
begin
  foreach tenant in array array['org_policy', 'invitation'] loop
    execute format('alter table %I enable row level security', tenant);
    execute format('alter table %I force row level security', tenant);
    execute format('create policy org_scope on %I to millpond_app
      using (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)
      with check (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)', tenant);
  end loop;
end $$;
grant select, insert, update on org_policy, invitation to millpond_app;
