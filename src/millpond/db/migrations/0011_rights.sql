-- Rights of runs: what a run's rights stand on besides the subject, and the one reader of rights across orgs.

-- An operator who was let in starts runs under a grant: they may do nothing more once it ends, and never open secrets.
alter table run add column lent uuid, add column granted_by text, add column behind text[],
  add check ((lent is null) = (granted_by is null)), add check (lent is null or stamp is not null);

-- Who has decided on it besides its maker: they stand behind the runs that it starts.
alter table schedule add column changed_by text[] not null default '{}';
alter table trigger add column changed_by text[] not null default '{}';

-- What somebody may now, asked by the engine before a step acts for them. It runs as a role that reads what decides that and
-- nothing else, that nobody can log in as; the application's role may not ask, since it asks for every org at once.
do $$
begin
  if not exists (select from pg_roles where rolname = 'millpond_rights') then
    begin
      create role millpond_rights nologin;
    exception when duplicate_object or unique_violation then null;
    end;
  end if;
  if not pg_has_role(current_user, 'millpond_rights',
                     case when current_setting('server_version_num')::int >= 160000 then 'set' else 'member' end) then
    execute format('grant millpond_rights to %I', current_user);
  end if;
  execute format('grant usage, create on schema %I to millpond_rights', current_schema());
end $$;
do $$
declare tenant text;
begin
  foreach tenant in array array['custom_role', 'membership', 'service_principal', 'api_key', 'access_grant', 'outside_identity'] loop
    execute format('create policy rights on %I for select to millpond_rights using (true)', tenant);
  end loop;
end $$;
grant select (org_id, suspended_at) on org to millpond_rights;
grant select (user_id, is_operator, disabled_at) on account to millpond_rights;
grant select (org_id, role, permissions) on custom_role to millpond_rights;
grant select (org_id, user_id, role) on membership to millpond_rights;
grant select (org_id, service_id, role, disabled_at) on service_principal to millpond_rights;
grant select (org_id, key_id, owner, scopes, expires_at, revoked_at) on api_key to millpond_rights;
grant select (org_id, grant_id, operator_id, is_read_only, expires_at, ended_at) on access_grant to millpond_rights;
grant select (org_id, identity_id, role, disabled_at) on outside_identity to millpond_rights;

-- One row for each that is asked about, by its place: why they may nothing any more, else role, scopes of a key, kind of grant.
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

-- Whether the org of this transaction lets people decide on runs that they started themselves.
create function may_resolve_own() returns boolean
  language plpgsql stable
  set search_path = millpond, pg_temp
as $$
declare allowed boolean := false;
begin
  if to_regclass('org_policy') is not null then
    execute 'select may_resolve_own from org_policy where org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint'
      into allowed;
  end if;
  return coalesce(allowed, false);
end
$$;
revoke all on function may_resolve_own() from public;
grant execute on function may_resolve_own() to millpond_app;
