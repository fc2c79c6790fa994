-- A claim looks each lane of what it takes up once, and not for every work item of it.

create or replace function claim_take(
    orgs bigint[], lanes bigint[], ranks bigint[], items uuid[], worker uuid, token uuid,
    moved_orgs bigint[], moved_lanes bigint[], cursors bigint[], actives boolean[],
    changed_orgs bigint[], changed_queues text[], virtuals float8[], maybe_empty boolean[],
    clock_queues text[], clocks float8[])
  returns table (org_id bigint, item_id uuid, run_id uuid, attempt integer, token_now uuid, deaths smallint, tries smallint,
                 cancel_requested boolean, flow text, version integer, queue text, input json, subject text,
                 timeout_s float8, deadline_at timestamptz, is_rerun boolean, duties smallint, kind text, step_key text,
                 stamp integer, permission text, lent uuid, granted_by text)
  language plpgsql volatile rows 100
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  with free as materialized (
    select p.org_id, p.lane_id, p.rank, p.item_id
    from unnest(orgs, lanes, ranks, items) as p(org_id, lane_id, rank, item_id)
    cross join lateral (
      select from item i where i.org_id = p.org_id and i.item_id = p.item_id
        and i.state = 'queued' and i.rank = p.rank and i.lane_id = p.lane_id
      for update skip locked
    ) i
  ),
  gone as (
    delete from ready r using free f
    where r.org_id = any(array[f.org_id]) and r.lane_id = any(array[f.lane_id]) and r.rank = any(array[f.rank])
      and r.item_id = any(array[f.item_id])
    returning r.org_id, r.item_id
  ),
  taken as (
    update item i set state = 'running', token = claim_take.token, attempt = i.attempt + 1, event_no = i.event_no + 1,
                      started_at = coalesce(i.started_at, clock_timestamp())
    from gone g where i.org_id = any(array[g.org_id]) and i.item_id = any(array[g.item_id])
    returning i.org_id, i.item_id, i.run_id, i.lane_id, i.attempt, i.event_no, i.deaths, i.tries, i.cancel_requested,
              i.duties, i.kind, i.queue, i.step_key
  ),
  named as materialized (
    select l.org_id, l.lane_id, l.queue, l.keys
    from (select distinct t.org_id, t.lane_id from taken t) t
    join lane l on l.org_id = any(array[t.org_id]) and l.lane_id = any(array[t.lane_id])
  ),
  leases as (
    insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)
    select t.org_id, t.item_id, t.run_id, t.lane_id, l.queue, l.keys, worker, t.attempt, claim_take.token
    from taken t join named l on l.org_id = t.org_id and l.lane_id = t.lane_id
  ),
  events as (
    insert into event (org_id, run_id, event_no, kind, data)
    select t.org_id, t.run_id, t.event_no, case when t.attempt = 1 then 'run.started' else 'run.resumed' end,
           json_build_object('attempt', t.attempt)
    -- Steps in other queues tell of their start themselves: the live row of their run is not to be locked here.
    from taken t where t.kind = 'run'
  ),
  l as materialized (
    select * from unnest(moved_orgs, moved_lanes, cursors, actives) as u(org_id, lane_id, cursor_rank, active)
  ),
  lanes as (
    update lane set cursor_rank = l.cursor_rank, active = l.active
    from l where lane.org_id = any(array[l.org_id]) and lane.lane_id = any(array[l.lane_id])
  ),
  s as materialized (
    select * from unnest(changed_orgs, changed_queues, virtuals, maybe_empty) as u(org_id, queue, virtual_s, maybe_empty)
  ),
  shares as (
    update share set virtual_s = s.virtual_s,
      active = not s.maybe_empty or exists (
        select from lane x where x.org_id = s.org_id and x.queue = s.queue and x.active
          and (x.org_id, x.lane_id) not in (select l.org_id, l.lane_id from l where not l.active) offset 0)
    from s where share.org_id = any(array[s.org_id]) and share.queue = any(array[s.queue])
  ),
  clocks as (
    insert into fair_clock (queue, virtual_s)
    select * from unnest(clock_queues, claim_take.clocks)
    on conflict (queue) do update set virtual_s = greatest(fair_clock.virtual_s, excluded.virtual_s)
  )
  select t.org_id, t.item_id, t.run_id, t.attempt, claim_take.token, t.deaths, t.tries, t.cancel_requested, r.flow,
         r.version, coalesce(t.queue, r.queue), case when t.kind = 'run' then r.input end, r.subject, r.timeout_s,
         r.deadline_at, r.rerun_of is not null, t.duties, t.kind, t.step_key, r.stamp, r.permission, r.lent, r.granted_by
  from taken t join run r on r.org_id = any(array[t.org_id]) and r.run_id = any(array[t.run_id]);
end
$$;
