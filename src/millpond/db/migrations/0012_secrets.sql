-- Secrets: values that organizations keep sealed, the keys that seal here, and which runs opened which.

-- The installation's keys by their ids, never what they are. One seals; the others still open what they sealed until all of
-- that is sealed anew. `audit_sealed` is what chained audit logs under an older key, sealed by key `audit_sealed_by`.
create table seal_key (
  key_id text primary key,
  is_current boolean not null,
  added_at timestamptz not null default clock_timestamp(),
  emptied_at timestamptz,
  audit_sealed bytea,
  audit_sealed_by text references seal_key (key_id),
  check ((audit_sealed is null) = (audit_sealed_by is null)),
  check (not is_current or (emptied_at is null and audit_sealed is null))
);
create unique index seal_key_current on seal_key (is_current) where is_current;
-- What is sealed already names the key that every host must have.
insert into seal_key (key_id, is_current)
select key_id, row_number() over (order by at desc) = 1
from (
  select seal_key_id as key_id, max(at) as at
  from (select seal_key_id, created_at as at from signing_key union all select seal_key_id, created_at from mail_outbox) s
  group by seal_key_id
) k;
grant select, insert, update on seal_key to millpond_app;

-- A value that the API takes and never gives out; it opens only with its org, its id and the key named here.
create table secret (
  org_id bigint not null references org (org_id),
  secret_id uuid not null,
  name text not null check (name ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
  description text not null default '' check (length(description) <= 500),
  sealed bytea not null,
  seal_key_id text not null references seal_key (key_id),
  version integer not null default 1 check (version > 0),
  created_by text not null,
  created_at timestamptz not null default clock_timestamp(),
  changed_by text not null,
  changed_at timestamptz not null default clock_timestamp(),
  used_at timestamptz,
  primary key (org_id, secret_id),
  unique (org_id, name)
);
alter table secret enable row level security;
alter table secret force row level security;
create policy org_scope on secret to millpond_app
  using (org_id = nullif(current_setting('millpond.org', true), '')::bigint)
  with check (org_id = nullif(current_setting('millpond.org', true), '')::bigint);
grant select, insert, update, delete on secret to millpond_app;

-- A step of kind `secret` tells that a run opened one, by its name: its value is hidden from then on.
alter table step
  drop constraint step_kind_check,
  add constraint step_kind_check check (kind in
    ('step', 'sleep', 'input', 'emit', 'value', 'state', 'child', 'join', 'signal', 'ending', 'secret'));
