-- Tries of steps under keys of their own, in what operators see of limits.

grant select (org_id, item_id, token, keys, since_us) on step_lease to millpond_recorder;
grant select (org_id, item_id, token, lane_id) on lease to millpond_recorder;
create policy recorder on step_lease for select to millpond_recorder using (nullif(current_setting('millpond.org', true), '') is null);

-- Tries of steps of all orgs that have room beside their runs, by what they count on: keys of the run, an empty one, keys of the step.
create function seated_of_all()
  returns table (org_id bigint, queue text, capability text, keys text[], items bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select h.org_id, l.queue, l.capability, l.keys || array[''] || h.keys, h.items
  from (select e.org_id, e.lane_id, s.keys, count(*) as items
        from step_lease s join lease e on e.org_id = s.org_id and e.item_id = s.item_id and e.token = s.token
        where s.since_us is null group by e.org_id, e.lane_id, s.keys) h
  join lane l on l.org_id = h.org_id and l.lane_id = h.lane_id
  where nullif(current_setting('millpond.org', true), '') is null
$$;

do $$
begin
  execute format('grant create on schema %I to millpond_recorder', current_schema());
  alter function seated_of_all() owner to millpond_recorder;
  revoke all on function seated_of_all() from public;
  grant execute on function seated_of_all() to millpond_app;
  execute format('revoke create on schema %I from millpond_recorder', current_schema());
end $$;
