-- Steps that need keys: room for one try of a step beside what its run has, and the line of those that wait for it.

-- What one try of a step counts on beside its run. It counts while the lease of its run with this token is there, and not a
-- moment longer, so that whatever ends a lease gives the room back. With `since_us` it has no room yet, and has waited since
-- then beside other branches of its run for so long that a place is kept for it. Written by the claim alone.
create table step_lease (
  org_id bigint not null,
  item_id uuid not null,
  step_key text not null,
  token uuid not null,
  keys text[] not null,
  since_us bigint,
  taken_at timestamptz not null default clock_timestamp(),
  primary key (org_id, item_id, step_key)
);

-- Steps of waiting runs that have had no room: each stands in a lane of all its keys, as a ready row with an id of its own. It
-- holds while its run waits. `rank`: since when it has waited, also over several waits.
create table step_need (
  org_id bigint not null,
  run_id uuid not null,
  step_key text not null,
  need_id uuid not null,
  lane_id bigint not null,
  rank bigint not null,
  keys text[] not null,
  primary key (org_id, run_id, step_key)
);
create unique index step_need_id on step_need (org_id, need_id);

-- The keys of a step that executes in another queue and has some of its own: those of its run and these.
alter table item add column keys text[];

do $$
declare tenant text;
begin
  foreach tenant in array array['step_lease', 'step_need'] loop
    execute format('alter table %I set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
      autovacuum_vacuum_cost_delay = 0)', tenant);
    execute format('alter table %I enable row level security', tenant);
    execute format('alter table %I force row level security', tenant);
    execute format('create policy org_scope on %I to millpond_app
      using (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)
      with check (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)', tenant);
    execute format('create policy engine_duty on %I to millpond_engine using (true) with check (true)', tenant);
    execute format('grant select, insert, update, delete on %I to millpond_engine', tenant);
    execute format('grant select on %I to millpond_app', tenant);
  end loop;
end $$;
-- The end of a run that nobody executes takes its steps out of their lines.
grant delete on step_need to millpond_app;

-- What tries of steps count on beside their runs, in the form of `claim_rooms` and read after its lock: keys of the run, an
-- empty one, keys of the step (seated); and for whom places are kept, with since when (us) and, as room, who it is (asked).
create function claim_seated()
  returns table (kind text, org_id bigint, lane_id bigint, queue text, capability text, keys text[], room text, n bigint,
                 us bigint)
  language plpgsql volatile rows 10
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
begin
  if not exists (select from step_lease) then
    return;
  end if;
  return query
  select 'seated', h.org_id, h.lane_id, l.queue, l.capability, l.keys || array[''] || h.keys, '', h.n, null::bigint
  from (select e.org_id, e.lane_id, s.keys, count(*) as n
        from step_lease s join lease e on e.org_id = s.org_id and e.item_id = s.item_id and e.token = s.token
        where s.since_us is null
        group by e.org_id, e.lane_id, s.keys) h
  join lane l on l.org_id = h.org_id and l.lane_id = h.lane_id;
  return query
  select 'asked', s.org_id, e.lane_id, l.queue, l.capability, l.keys || array[''] || s.keys, s.item_id || ' ' || s.step_key,
         0::bigint, s.since_us
  from step_lease s join lease e on e.org_id = s.org_id and e.item_id = s.item_id and e.token = s.token
  join lane l on l.org_id = e.org_id and l.lane_id = e.lane_id
  where s.since_us is not null order by s.since_us limit 128;
end
$$;
