-- Steps take turns beside lanes in rooms that several queues need (decision 0038): while any wait under leases, accounts stay.

-- Takes crossings away under which no lane stands any more, and what tells no more of an org than no row does. Where a step
-- stands in line under its run's lease is known by its keys only: as long as one does no crossing is over, and what its org
-- was given back stays.
create or replace function drop_crossings() returns bigint
  language plpgsql volatile
  set search_path = millpond, pg_temp
as $$
declare
  gone bigint := 0;
begin
  if not exists (select from crossing) then
    return 0;
  end if;
  perform pg_advisory_xact_lock(7741001);
  if not exists (select from step_lease s where s.since_us is not null) then
    delete from crossing c where not exists (select from room r where r.room = c.room);
    get diagnostics gone = row_count;
  end if;
  delete from crossing_share x where (x.org_id, x.room) in (
    select y.org_id, y.room from crossing_share y left join crossing c on c.room = y.room
    where (c.room is null or y.virtual_s <= c.virtual_s)
      and not exists (select from lane l where l.parked_on = y.room and l.org_id = y.org_id and l.by_turn and not l.active)
      and not exists (select from step_lease s where s.org_id = y.org_id and s.since_us is not null)
    limit 1000);
  return gone;
end
$$;

-- How an org that asks stands in those of these rooms that are crossings: what it has used there, in worker-seconds over its
-- weight beyond the crossing's clock, and how many orgs go before it whose lanes or steps wait there; no more than so many.
grant select on crossing, crossing_share to millpond_recorder;
create policy recorder on crossing_share for select to millpond_recorder using (true);
create policy recorder_of_lines on step_lease for select to millpond_recorder using (since_us is not null);
create function turn_of(rooms text[], most integer) returns table (room text, used_s double precision, orgs bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select o.room, o.virtual_s - o.clock_s, n.orgs
  from (
    select c.room, c.virtual_s as clock_s, a.org_id,
           greatest(coalesce((select x.virtual_s from crossing_share x where x.org_id = a.org_id and x.room = c.room), c.virtual_s),
                    c.virtual_s - 60) as virtual_s
    from (select nullif(current_setting('millpond.org', true), '')::bigint as org_id) a, crossing c
    where a.org_id is not null and c.room = any(rooms)
  ) o
  cross join lateral (
    select count(*) as orgs from (
      select from crossing_share y
      where y.room = o.room and y.org_id <> o.org_id and y.virtual_s < o.virtual_s
        and (exists (select from lane l where l.parked_on = y.room and l.org_id = y.org_id and l.by_turn and not l.active)
             or exists (select from lane l where l.parked_on = y.room and l.org_id = y.org_id and l.active)
             or exists (select from step_lease s where s.org_id = y.org_id and s.since_us is not null))
      limit most) y
  ) n
$$;

do $$
begin
  execute format('grant create on schema %I to millpond_recorder', current_schema());
  alter function turn_of(text[], integer) owner to millpond_recorder;
  execute format('revoke create on schema %I from millpond_recorder', current_schema());
end $$;
revoke all on function turn_of(text[], integer) from public;
grant execute on function turn_of(text[], integer) to millpond_app;
