-- Rights that ended stay ended: whoever comes back begins anew.

-- Ends the grants of somebody who is no operator, in every org: what they are for is over. Of an operator it ends none, so
-- that whoever may call it can take nothing from anybody.
create policy ending on access_grant for update to millpond_rights using (true) with check (true);
grant update (ended_at) on access_grant to millpond_rights;
do $$
begin
  execute format('grant create on schema %I to millpond_rights', current_schema());
end $$;
create function end_grants_of(former uuid) returns table (org_id bigint, grant_id uuid)
  language sql volatile security definer
  set search_path = millpond, pg_temp
as $$
  update access_grant g set ended_at = clock_timestamp()
  where g.operator_id = former and g.ended_at is null and g.expires_at > clock_timestamp()
    and not exists (select from account a where a.user_id = former and a.is_operator)
  returning g.org_id, g.grant_id
$$;
alter function end_grants_of(uuid) owner to millpond_rights;
revoke all on function end_grants_of(uuid) from public;
grant execute on function end_grants_of(uuid) to millpond_app;
do $$
begin
  execute format('revoke create on schema %I from millpond_rights', current_schema());
end $$;

-- What ended before this: keys of people who are members no more, which were refused and would have been good again when
-- their owner came back, and grants that their operator has lost. The policies of these tables let their owner see nothing.
alter table api_key no force row level security;
alter table membership no force row level security;
alter table access_grant no force row level security;
update api_key k set revoked_at = clock_timestamp()
where k.revoked_at is null and split_part(k.owner, ':', 1) = 'user'
  and not exists (select from membership m where m.org_id = k.org_id and m.user_id = split_part(k.owner, ':', 2)::uuid);
update access_grant g set ended_at = clock_timestamp()
where g.ended_at is null and g.expires_at > clock_timestamp()
  and not exists (select from account a where a.user_id = g.operator_id and a.is_operator);
alter table api_key force row level security;
alter table membership force row level security;
alter table access_grant force row level security;
