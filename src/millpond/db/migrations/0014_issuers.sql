-- Outside issuers of tokens: which an org trusts, which claims give which of its roles, and what ends that.

create table issuer (
  org_id bigint not null references org (org_id),
  issuer_id uuid not null,
  name text not null check (length(name) between 1 and 200),
  url text not null check (length(url) between 8 and 500),
  audiences text[] not null check (cardinality(audiences) between 1 and 10),
  algorithms text[] not null check (cardinality(algorithms) > 0 and algorithms <@ array[
    'RS256', 'RS384', 'RS512', 'PS256', 'PS384', 'PS512', 'ES256', 'ES384', 'ES512', 'EdDSA']),
  org_claim text check (length(org_claim) between 1 and 200),
  org_values text[] not null default '{}',
  trust_days integer not null default 30 check (trust_days between 1 and 365),
  created_by text not null,
  created_at timestamptz not null default clock_timestamp(),
  disabled_at timestamptz,
  primary key (org_id, issuer_id),
  unique (org_id, url),
  check ((org_claim is null) = (cardinality(org_values) = 0))
);

-- Which values of which claim give which role; the first that fits counts.
create table issuer_rule (
  org_id bigint not null,
  issuer_id uuid not null,
  nth integer not null,
  claim text not null check (length(claim) between 1 and 200),
  claim_values text[] not null check (cardinality(claim_values) between 1 and 100),
  role text not null,
  primary key (org_id, issuer_id, nth),
  foreign key (org_id, issuer_id) references issuer (org_id, issuer_id) on delete cascade
);

do $$
declare tenant text;
begin
  foreach tenant in array array['issuer', 'issuer_rule'] loop
    execute format('alter table %I enable row level security', tenant);
    execute format('alter table %I force row level security', tenant);
    execute format('create policy org_scope on %I to millpond_app
      using (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)
      with check (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)', tenant);
  end loop;
end $$;
grant select, insert, update, delete on issuer, issuer_rule to millpond_app;

-- The role is what the newest token's claims gave (null: none any more), by which claim, and when that token was issued.
alter table outside_identity
  alter column role drop not null,
  add column claim text,
  add column claim_value text,
  add column mapped_at timestamptz not null default to_timestamp(0);

-- Whether the issuer of an identity is trusted still, and has vouched for it lately.
create function issuer_stands(org bigint, address text, seen timestamptz) returns boolean
  language sql stable
  set search_path = millpond, pg_temp
as $$
  select exists (select from issuer i where i.org_id = org and i.url = address and i.disabled_at is null
                 and seen > clock_timestamp() - make_interval(days => i.trust_days))
$$;
revoke all on function issuer_stands(bigint, text, timestamptz) from public;
grant execute on function issuer_stands(bigint, text, timestamptz) to millpond_app, millpond_rights;

-- As migration 0004 made it, but that an outside identity stands on its issuer too.
create or replace function refuse_stale(subject text, stamp integer, session uuid, lent uuid) returns void
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
               where o.org_id = org and o.identity_id = id and o.version = stamp and o.disabled_at is null
                 and o.role is not null and issuer_stands(o.org_id, o.issuer, o.seen_at)) then
      return;
    end if;
  end if;
  raise exception 'rights' using errcode = 'MP401';
end
$$;

-- The same for `rights_now` of migration 0011. It belongs to a role that makes nothing but for this moment.
create policy rights on issuer for select to millpond_rights using (true);
grant select (org_id, url, trust_days, disabled_at) on issuer to millpond_rights;
grant select (issuer, seen_at) on outside_identity to millpond_rights;
do $$
begin
  execute format('grant create on schema %I to millpond_rights', current_schema());
end $$;
drop function rights_now(bigint[], text[], uuid[]);
create function rights_now(orgs bigint[], subjects text[], lents uuid[])
  returns table (nth bigint, denied text, role text, custom text[], scopes text[], is_read_only boolean)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  with asked as (
    select u.nth, u.org_id, u.lent, split_part(u.subject, ':', 1) as kind,
           case when u.subject ~ '^[a-z]+:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                then split_part(u.subject, ':', 2)::uuid end as id
    from unnest(orgs, subjects, lents) with ordinality as u(org_id, subject, lent, nth)
  ),
  holders as (
    select a.nth, a.org_id, a.lent, a.kind = 'key' as is_of_key, k.scopes, coalesce(split_part(k.owner, ':', 1), a.kind) as kind,
           coalesce(split_part(k.owner, ':', 2)::uuid, a.id) as id
    from asked a
    left join api_key k on a.kind = 'key' and k.org_id = a.org_id and k.key_id = a.id and k.revoked_at is null
      and (k.expires_at is null or k.expires_at > clock_timestamp())
  ),
  found as (
    select h.*, o.org_id is null or o.suspended_at is not null as is_suspended, p.disabled_at is not null as is_disabled,
           p.is_operator, g.grant_id, g.is_read_only,
           case h.kind when 'user' then m.role when 'service' then s.role when 'outside' then i.role end as role
    from holders h
    left join org o on o.org_id = h.org_id
    left join account p on h.kind = 'user' and p.user_id = h.id
    left join membership m on h.kind = 'user' and m.org_id = h.org_id and m.user_id = h.id
    left join service_principal s on h.kind = 'service' and s.org_id = h.org_id and s.service_id = h.id and s.disabled_at is null
    left join outside_identity i on h.kind = 'outside' and i.org_id = h.org_id and i.identity_id = h.id and i.disabled_at is null
      and issuer_stands(i.org_id, i.issuer, i.seen_at)
    left join access_grant g on g.org_id = h.org_id and g.grant_id = h.lent and g.operator_id = h.id and g.ended_at is null
      and g.expires_at > clock_timestamp()
  )
  select f.nth,
         case when f.is_suspended then 'org_suspended'
              when f.is_of_key and f.scopes is null then 'key_ended'
              when f.is_disabled then 'account_disabled'
              when f.lent is not null then case when f.grant_id is null or f.is_operator is not true then 'grant_ended' end
              when f.role is null then case f.kind when 'user' then 'not_a_member' else 'identity_disabled' end
         end,
         f.role, c.permissions, case when f.is_of_key then f.scopes end, case when f.lent is not null then f.is_read_only end
  from found f
  left join custom_role c on c.org_id = f.org_id and c.role = f.role
$$;
alter function rights_now(bigint[], text[], uuid[]) owner to millpond_rights;
revoke all on function rights_now(bigint[], text[], uuid[]) from public;
grant execute on function rights_now(bigint[], text[], uuid[]) to millpond_engine;
do $$
begin
  execute format('revoke create on schema %I from millpond_rights', current_schema());
end $$;
