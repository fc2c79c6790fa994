-- One message where there were three or four: a submit that is a transaction by itself, and a claim for which all that
-- is ready has room.

-- Sets the org of a statement that is a transaction by itself, and refuses callers whose rights are no more what they were.
create function enter_org(org bigint, subjects text[], stamps integer[], sessions uuid[], lents uuid[]) returns bigint
  language plpgsql volatile
  set search_path = millpond, pg_temp
as $$
begin
  perform set_config('millpond.org', org::text, true);
  for n in 1 .. coalesce(cardinality(subjects), 0) loop
    perform refuse_stale(subjects[n], stamps[n], sessions[n], lents[n]);
  end loop;
  return org;
end
$$;
revoke all on function enter_org(bigint, text[], integer[], uuid[], uuid[]) from public;
grant execute on function enter_org(bigint, text[], integer[], uuid[], uuid[]) to millpond_app, millpond_engine;

-- The second half of a claim: picked ready rows become leases (a row whose item is locked or changed is left), and what that
-- leaves of lanes (`moved_*`), of shares (`changed_*`) and of the queues' clocks is stored.
create function claim_take(
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
    where r.org_id = f.org_id and r.lane_id = f.lane_id and r.rank = f.rank and r.item_id = f.item_id
    returning r.org_id, r.item_id
  ),
  taken as (
    update item i set state = 'running', token = claim_take.token, attempt = i.attempt + 1, event_no = i.event_no + 1,
                      started_at = coalesce(i.started_at, clock_timestamp())
    from gone g where i.org_id = g.org_id and i.item_id = g.item_id
    returning i.org_id, i.item_id, i.run_id, i.lane_id, i.attempt, i.event_no, i.deaths, i.tries, i.cancel_requested,
              i.duties, i.kind, i.queue, i.step_key
  ),
  leases as (
    insert into lease (org_id, item_id, run_id, lane_id, queue, keys, worker_id, attempt, token)
    select t.org_id, t.item_id, t.run_id, t.lane_id, l.queue, l.keys, worker, t.attempt, claim_take.token
    from taken t join lane l on l.org_id = t.org_id and l.lane_id = t.lane_id
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
    from l where lane.org_id = l.org_id and lane.lane_id = l.lane_id
  ),
  s as materialized (
    select * from unnest(changed_orgs, changed_queues, virtuals, maybe_empty) as u(org_id, queue, virtual_s, maybe_empty)
  ),
  shares as (
    update share set virtual_s = s.virtual_s,
      active = not s.maybe_empty or exists (
        select from lane x where x.org_id = s.org_id and x.queue = s.queue and x.active
          and not exists (select from l where l.org_id = x.org_id and l.lane_id = x.lane_id and not l.active))
    from s where share.org_id = s.org_id and share.queue = s.queue
  ),
  clocks as (
    insert into fair_clock (queue, virtual_s)
    select * from unnest(clock_queues, claim_take.clocks)
    on conflict (queue) do update set virtual_s = greatest(fair_clock.virtual_s, excluded.virtual_s)
  )
  select t.org_id, t.item_id, t.run_id, t.attempt, claim_take.token, t.deaths, t.tries, t.cancel_requested, r.flow,
         r.version, coalesce(t.queue, r.queue), case when t.kind = 'run' then r.input end, r.subject, r.timeout_s,
         r.deadline_at, r.rerun_of is not null, t.duties, t.kind, t.step_key, r.stamp, r.permission, r.lent, r.granted_by
  from taken t join run r on r.org_id = t.org_id and r.run_id = t.run_id;
end
$$;

-- A whole claim in one statement, for when all that is read has room, so that there is nothing to decide: every item goes.
-- `orgs` is how many orgs of each queue are read, `estimates` the worker-seconds that work of each of `able` is expected to
-- take. The first row tells how many arrivals were consumed (org_id) and how it went (attempt): -1 the worker's session is
-- gone, 0 nothing was taken, since not all has room or was read, or somebody holds a row locked, 1 all was taken, 2 there was
-- nothing in the lanes that were read.
create function claim_at_once(most integer, worker uuid, token uuid, queues text[], slots integer[], orgs integer[],
                              able text[], estimates float8[], depth integer)
  returns table (org_id bigint, item_id uuid, run_id uuid, attempt integer, token_now uuid, deaths smallint, tries smallint,
                 cancel_requested boolean, flow text, version integer, queue text, input json, subject text,
                 timeout_s float8, deadline_at timestamptz, is_rerun boolean, duties smallint, kind text, step_key text,
                 stamp integer, permission text, lent uuid, granted_by text)
  language plpgsql volatile rows 10
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  h record;
  arrivals bigint;
  n integer;
  is_whole boolean := true;
  is_empty boolean := true;
  picked_orgs bigint[] := '{}';
  picked_lanes bigint[] := '{}';
  picked_ranks bigint[] := '{}';
  picked_items uuid[] := '{}';
  lane_queues text[] := '{}';
  lane_orgs bigint[] := '{}';
  lane_ids bigint[] := '{}';
  lane_counts integer[] := '{}';
  lane_lasts bigint[] := '{}';
  lane_estimates float8[] := '{}';
  lane_weights float8[] := '{}';
  lane_virtuals float8[] := '{}';
  share_orgs bigint[];
  share_queues text[];
  share_virtuals float8[];
  clock_queues text[];
  clocks float8[];
begin
  for h in select * from claim_heads(most, worker, queues, orgs, able, depth) loop
    if h.queue = '' then
      arrivals := h.lane_id;
      if h.offset_us = 0 then
        return query select arrivals, null::uuid, null::uuid, -1, null::uuid, null::smallint, null::smallint, null::boolean, null,
          null::int, null, null::json, null, null::float8, null::timestamptz, null::boolean, null::smallint, null, null,
          null::int, null, null::uuid, null;
        return;
      end if;
      continue;
    end if;
    n := coalesce(cardinality(h.items), 0);
    is_whole := is_whole and n < depth;
    is_empty := false;
    picked_orgs := picked_orgs || array_fill(h.org_id, array[n]);
    picked_lanes := picked_lanes || array_fill(h.lane_id, array[n]);
    picked_ranks := picked_ranks || h.ranks;
    picked_items := picked_items || h.items;
    lane_queues := lane_queues || h.queue;
    lane_orgs := lane_orgs || h.org_id;
    lane_ids := lane_ids || h.lane_id;
    lane_counts := lane_counts || n;
    lane_lasts := lane_lasts || coalesce(h.ranks[n] + h.offset_us, 0);
    lane_estimates := lane_estimates || estimates[array_position(able, h.capability)];
    lane_weights := lane_weights || h.weight;
    lane_virtuals := lane_virtuals || h.virtual_s;
  end loop;
  n := 1;
  if not is_whole or exists (select from unnest(lane_queues, lane_counts) as l(queue, n) join unnest(queues, slots) as q(queue, slots)
             on q.queue = l.queue group by q.queue, q.slots having sum(l.n) > q.slots)
    or cardinality(picked_items) <> (
      select count(*) from unnest(picked_orgs, picked_lanes, picked_ranks, picked_items) as p(org_id, lane_id, rank, item_id)
      cross join lateral (
        select from item i where i.org_id = p.org_id and i.item_id = p.item_id
          and i.state = 'queued' and i.rank = p.rank and i.lane_id = p.lane_id
        for update skip locked) i)
  then
    n := 0;
  elsif not is_empty and cardinality(picked_items) = 0 then
    n := 2;
  end if;
  return query select arrivals, null::uuid, null::uuid, n, null::uuid, null::smallint, null::smallint, null::boolean, null,
    null::int, null, null::json, null, null::float8, null::timestamptz, null::boolean, null::smallint, null, null, null::int,
    null, null::uuid, null;
  if n = 0 or is_empty then
    return;
  end if;
  select array_agg(s.org_id), array_agg(s.queue), array_agg(s.virtual_s) into share_orgs, share_queues, share_virtuals
  from (
    select l.org_id, l.queue, min(l.virtual_s) + sum(l.n * l.estimate_s / l.weight) as virtual_s
    from unnest(lane_queues, lane_orgs, lane_counts, lane_estimates, lane_weights, lane_virtuals)
      as l(queue, org_id, n, estimate_s, weight, virtual_s)
    group by l.org_id, l.queue
  ) s;
  -- The clock of a queue is the virtual start of the last item that goes.
  select array_agg(c.queue), array_agg(c.virtual_s) into clock_queues, clocks
  from (
    select s.queue, max(s.virtual_s - s.last_s) as virtual_s
    from (
      select l.org_id, l.queue, min(l.virtual_s) + sum(l.n * l.estimate_s / l.weight) as virtual_s,
             (array_agg(l.estimate_s / l.weight order by l.last desc))[1] as last_s
      from unnest(lane_queues, lane_orgs, lane_counts, lane_lasts, lane_estimates, lane_weights, lane_virtuals)
        as l(queue, org_id, n, last, estimate_s, weight, virtual_s)
      where l.n > 0 group by l.org_id, l.queue
    ) s
    group by s.queue
  ) c;
  return query
  -- Every lane is empty then, and has the highest rank, since its next arrival brings its own.
  select * from claim_take(picked_orgs, picked_lanes, picked_ranks, picked_items, worker, token, lane_orgs, lane_ids,
    array_fill(4611686018427387904, array[cardinality(lane_ids)]), array_fill(false, array[cardinality(lane_ids)]),
    share_orgs, share_queues, share_virtuals, array_fill(true, array[cardinality(share_orgs)]),
    coalesce(clock_queues, '{}'), coalesce(clocks, '{}'));
end
$$;
