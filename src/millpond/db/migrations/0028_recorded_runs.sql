-- What a replay of limits has to know of runs that have ended.

-- When a run first could go: what was to begin later is told of as queued when it is due.
create function run_ready_at(org bigint, run uuid, created timestamptz) returns timestamptz
  language sql stable
  set search_path = millpond, pg_temp
as $$
  select coalesce((select e.at from event e
                   where e.org_id = org and e.run_id = run and e.event_no <= 3 and e.kind = 'run.queued'
                   order by e.event_no limit 1), created)
$$;
revoke all on function run_ready_at(bigint, uuid, timestamptz) from public;

-- How long workers had a run that ended `until`, in seconds: from each start to what ended that stay.
create function run_worked_s(org bigint, run uuid, until timestamptz) returns float8
  language sql stable
  set search_path = millpond, pg_temp
as $$
  select coalesce(sum(greatest(0, extract(epoch from coalesce(x.at, until) - e.at))), 0)::float8
  from event e left join lateral (
    select x.at from event x
    where x.org_id = org and x.run_id = run and x.event_no > e.event_no
      and x.kind in ('run.waiting', 'run.awaiting_input', 'run.retrying', 'run.released', 'run.rescued', 'run.blocked',
                     'run.started', 'run.resumed')
    order by x.event_no limit 1
  ) x on true
  where e.org_id = org and e.run_id = run and e.kind in ('run.started', 'run.resumed')
$$;
revoke all on function run_worked_s(bigint, uuid, timestamptz) from public;

-- The same across orgs, for operators: a page by org and run. It runs as a role that reads when runs came and went, that nobody
-- can log in as. Keys are those that the flow's code declares, and only a transaction without an org gets any row.
do $$
begin
  if not exists (select from pg_roles where rolname = 'millpond_recorder') then
    begin
      create role millpond_recorder nologin;
    exception when duplicate_object or unique_violation then null;
    end;
  end if;
  if not pg_has_role(current_user, 'millpond_recorder',
                     case when current_setting('server_version_num')::int >= 160000 then 'set' else 'member' end) then
    execute format('grant millpond_recorder to %I', current_user);
  end if;
  execute format('grant usage, create on schema %I to millpond_recorder', current_schema());
end $$;
create policy recorder on run for select to millpond_recorder using (true);
create policy recorder on event for select to millpond_recorder using (true);
create policy recorder on org for select to millpond_recorder using (true);
grant select (org_id, run_id, flow, version, queue, keys, priority, created_at, started_at, finished_at, attempts, outcome)
  on run to millpond_recorder;
grant select (org_id, run_id, event_no, kind, at) on event to millpond_recorder;
grant select (org_id, slug) on org to millpond_recorder;
grant select (flow, version, keys) on flow_version to millpond_recorder;
grant execute on function run_ready_at(bigint, uuid, timestamptz), run_worked_s(bigint, uuid, timestamptz)
  to millpond_app, millpond_recorder;

create function recorded_of_all(since uuid, after_org bigint, after_run uuid, only_queue text, most integer)
  returns table (org_id bigint, run_id uuid, org text, flow text, version integer, queue text, keys text[], priority integer,
                 ready_at timestamptz, started_at timestamptz, worked_s float8)
  language sql stable security definer rows 1000
  set search_path = millpond, pg_temp
as $$
  select o.org_id, r.run_id, o.slug, r.flow, r.version, r.queue,
         array(select unnest(r.keys) intersect select unnest(f.keys) order by 1), r.priority,
         run_ready_at(o.org_id, r.run_id, r.created_at), r.started_at,
         case when r.attempts = 1 then extract(epoch from r.finished_at - r.started_at)::float8
              else run_worked_s(o.org_id, r.run_id, r.finished_at) end
  from org o
  cross join lateral (
    select n.run_id, n.flow, n.version, n.queue, n.keys, n.priority, n.created_at, n.started_at, n.finished_at, n.attempts
    from run n
    where n.org_id = o.org_id and n.run_id >= since and (o.org_id > after_org or n.run_id > after_run)
      and (only_queue is null or n.queue = only_queue) and n.outcome is not null and n.started_at is not null
    order by n.run_id limit most
  ) r
  left join flow_version f on f.flow = r.flow and f.version = r.version
  where o.org_id >= after_org and nullif(current_setting('millpond.org', true), '') is null
  order by o.org_id, r.run_id limit most
$$;
alter function recorded_of_all(uuid, bigint, uuid, text, integer) owner to millpond_recorder;
revoke all on function recorded_of_all(uuid, bigint, uuid, text, integer) from public;
grant execute on function recorded_of_all(uuid, bigint, uuid, text, integer) to millpond_app;
do $$
begin
  execute format('revoke create on schema %I from millpond_recorder', current_schema());
end $$;
