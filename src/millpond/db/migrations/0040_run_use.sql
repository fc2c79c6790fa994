-- What runs used of tokens, kept for replays of limits as long as the runs are.

-- One row for each call that a record tells of; `keys` are what the model's name stands for, `carried` the providers and models
-- among the own keys of its step. `is_lost`: the call was cut off, and nobody knows what it used. Written with the record, never changed, deleted with the run.
create table run_use (
  org_id bigint,
  run_id uuid,
  use_id uuid,
  keys text[] not null,
  tokens bigint not null check (tokens >= 0),
  is_lost boolean not null default false,
  carried text[] not null default '{}',
  primary key (org_id, run_id, use_id)
);
alter table run_use enable row level security;
alter table run_use force row level security;
create policy org_scope on run_use to millpond_app
  using (org_id = nullif(current_setting('millpond.org', true), '')::bigint)
  with check (org_id = nullif(current_setting('millpond.org', true), '')::bigint);
create policy engine_duty on run_use to millpond_engine using (true) with check (true);
create policy recorder on run_use for select to millpond_recorder using (true);
grant select on run_use to millpond_app, millpond_recorder;
grant select, insert, delete on run_use to millpond_engine;

-- Whether it is known what a run used, also that it used none: a worker ended it that records that. One of the release before
-- does not; of a run that nobody's worker ended (cancelled, overdue, poisoned) not all may have been told.
alter table run add column tells_use boolean not null default false;
grant select (urgency, tells_use) on run to millpond_recorder;

-- What a run used, by those of the keys `named` that it was used of. `provider:` and `model:` alone are another one than these,
-- which its step had among its own keys: it counts under no limit on one of these, as in `claim_tokens`.
create function run_used(org bigint, run uuid, named text[]) returns json
  language sql stable
  set search_path = millpond, pg_temp
as $$
  select coalesce(json_agg(json_build_object('keys', u.keys, 'tokens', u.tokens, 'is_lost', u.is_lost) order by u.keys), '[]')
  from (
    select array(
             select unnest(x.keys) intersect select unnest(named)
             union
             select split_part(c.key, ':', 1) || ':' from unnest(x.carried) c(key)
             where c.key <> all(named) and (c.key = any(x.keys) or not exists (
               select from unnest(x.carried) o(key)
               where split_part(o.key, ':', 1) = split_part(c.key, ':', 1) and o.key = any(named)))
             order by 1) as keys,
           sum(x.tokens)::bigint as tokens, bool_or(x.is_lost) as is_lost
    from run_use x where x.org_id = org and x.run_id = run group by 1
  ) u
$$;
revoke all on function run_used(bigint, uuid, text[]) from public;
grant execute on function run_used(bigint, uuid, text[]) to millpond_app, millpond_recorder;

-- As before, with the class of each run and what it used of the keys that its flow declares.
do $$
begin
  execute format('grant create on schema %I to millpond_recorder', current_schema());
end $$;
drop function recorded_of_all(uuid, bigint, uuid, text, integer);
create function recorded_of_all(since uuid, after_org bigint, after_run uuid, only_queue text, most integer)
  returns table (org_id bigint, run_id uuid, org text, flow text, version integer, queue text, keys text[], priority integer,
                 urgency text, ready_at timestamptz, started_at timestamptz, worked_s float8, used json)
  language sql stable security definer rows 1000
  set search_path = millpond, pg_temp
as $$
  select o.org_id, r.run_id, o.slug, r.flow, r.version, r.queue, k.keys, r.priority, coalesce(r.urgency, 'standard'),
         run_ready_at(o.org_id, r.run_id, r.created_at), r.started_at,
         case when r.attempts = 1 then extract(epoch from r.finished_at - r.started_at)::float8
              else run_worked_s(o.org_id, r.run_id, r.finished_at) end,
         case when r.tells_use then run_used(o.org_id, r.run_id, k.keys) end
  from org o
  cross join lateral (
    select n.run_id, n.flow, n.version, n.queue, n.keys, n.priority, n.urgency, n.created_at, n.started_at, n.finished_at,
           n.attempts, n.tells_use
    from run n
    where n.org_id = o.org_id and n.run_id >= since and (o.org_id > after_org or n.run_id > after_run)
      and (only_queue is null or n.queue = only_queue) and n.outcome is not null and n.started_at is not null
    order by n.run_id limit most
  ) r
  left join flow_version f on f.flow = r.flow and f.version = r.version
  cross join lateral (select array(select unnest(r.keys) intersect select unnest(f.keys) order by 1) as keys) k
  where o.org_id >= after_org and nullif(current_setting('millpond.org', true), '') is null
  order by o.org_id, r.run_id limit most
$$;
alter function recorded_of_all(uuid, bigint, uuid, text, integer) owner to millpond_recorder;
revoke all on function recorded_of_all(uuid, bigint, uuid, text, integer) from public;
grant execute on function recorded_of_all(uuid, bigint, uuid, text, integer) to millpond_app;

-- The lanes of another org in a queue as `lanes_in_line` has them; so many are looked at, of each sort, whichever these are.
create function lanes_of_other(org bigint, in_queue text, able text[], costs float8[], most integer)
  returns table (lane_id bigint, offset_us bigint, first_rank bigint, cost float8)
  language sql stable  -- as lanes_in_line
as $$
  select n.lane_id, n.offset_us, min(n.first_rank), min(e.cost)
  from (
    (select l.lane_id, l.offset_us, l.capability, l.cursor_rank as first_rank from lane l
     where l.org_id = org and l.queue = in_queue and l.active limit most)
    union all
    (select a.lane_id, a.offset_us, a.capability, a.min_rank from arrival a
     where a.org_id = org and a.queue = in_queue
       and not exists (select from lane p where p.org_id = org and p.lane_id = a.lane_id and p.parked_on is not null and not p.active)
     limit most)
  ) n
  join unnest(able, costs) as e(able, cost) on e.able = n.capability
  where not exists (select from pause z where z.org_id = org and z.queue in ('', in_queue)
                                          and (z.flow = '' or z.flow || '@' = rtrim(n.capability, '0123456789!')))
  group by n.lane_id, n.offset_us
$$;

-- As before, but where more orgs stand before than twice what is told of and have nothing that can go, a last row without `ahead`
-- says that there may be more; and of another org only so many lanes are read.
create or replace function fair_line(in_queue text, in_lane bigint, in_rank bigint, in_item uuid, able text[], costs float8[], most integer)
  returns table (weight float8, virtual_s float8, goes_first boolean, ahead float8[])
  language plpgsql stable security definer rows 100
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
declare
  asking bigint := nullif(current_setting('millpond.org', true), '')::bigint;
  clock_s float8 := coalesce((select c.virtual_s from fair_clock c where c.queue = in_queue), 0);
  least_s float8 := (select min(c) from unnest(costs) c);
  own_weight float8;
  own_s float8;
  own_at bigint;
  own_ahead float8[];
  until_s float8;
  one record;
  line float8[];
  found_before bigint;
  looked_at bigint := 0;
begin
  if asking is null then
    return;
  end if;
  select s.weight, case when s.active then s.virtual_s else greatest(s.virtual_s, clock_s) end into own_weight, own_s
  from share s where s.org_id = asking and s.queue = in_queue;
  own_weight := coalesce(own_weight, 1);
  own_s := coalesce(own_s, clock_s);
  own_at := in_rank + coalesce((select l.offset_us from lanes_in_line(asking, in_queue, able, costs, in_lane) l where l.lane_id = in_lane limit 1), 0);
  own_ahead := array(
    select l.cost from lanes_in_line(asking, in_queue, able, costs, in_lane) l
    cross join lateral (
      select r.rank, r.item_id from ready r
      where r.org_id = asking and r.lane_id = l.lane_id and r.rank >= l.first_rank and r.rank <= own_at - l.offset_us
      order by r.rank, r.item_id limit most + 1
    ) r
    where (r.rank + l.offset_us, l.lane_id, r.item_id) < (own_at, in_lane, in_item)
    order by r.rank + l.offset_us, l.lane_id, r.item_id limit most + 1);
  return query select own_weight, own_s, false, own_ahead;
  found_before := cardinality(own_ahead);
  until_s := own_s + coalesce((select sum(c) from unnest(own_ahead) c), 0) / own_weight;
  until_s := until_s + 1e-9 * greatest(1, abs(until_s));
  for one in
    select x.org_id, x.weight, x.virtual_s from (
      (select s.org_id, s.weight, s.virtual_s from share s
       where s.queue = in_queue and s.active and s.virtual_s <= until_s
       order by s.virtual_s, s.org_id limit 2 * (most + 1))
      union all
      (select a.org_id, coalesce(s.weight, 1), greatest(coalesce(s.virtual_s, 0), clock_s)
       from (select distinct r.org_id from (select a.org_id from arrival a where a.queue = in_queue limit 5000) r) a
       left join share s on s.org_id = a.org_id and s.queue = in_queue
       where not coalesce(s.active, false) and greatest(coalesce(s.virtual_s, 0), clock_s) <= until_s)
    ) x
    where x.org_id <> asking order by x.virtual_s, x.org_id
  loop
    exit when found_before > most;
    looked_at := looked_at + 1;
    if looked_at > 2 * most then
      -- Where so many orgs have nothing that can go, who else stands before is not looked for.
      return query select one.weight, one.virtual_s, false, null::float8[];
      exit;
    end if;
    line := array(
      select l.cost from lanes_of_other(one.org_id, in_queue, able, costs, 2 * (most + 1)) l
      cross join lateral (
        select r.rank, r.item_id from ready r
        where r.org_id = one.org_id and r.lane_id = l.lane_id and r.rank >= l.first_rank
        order by r.rank, r.item_id limit least(most + 1 - found_before, ceil((until_s - one.virtual_s) * one.weight / least_s) + 1)::bigint
      ) r
      order by r.rank + l.offset_us, l.lane_id, r.item_id
      limit least(most + 1 - found_before, ceil((until_s - one.virtual_s) * one.weight / least_s) + 1)::bigint);
    if cardinality(line) > 0 then
      return query select one.weight, one.virtual_s, one.org_id < asking, line;
      found_before := found_before + (
        select count(*) from (
          select one.virtual_s + (sum(u.cost) over (order by u.n) - u.cost) / one.weight as start_s
          from unnest(line) with ordinality as u(cost, n)) c
        where c.start_s < own_s + coalesce((select sum(x) from unnest(own_ahead) x), 0) / own_weight);
    end if;
  end loop;
end
$$;

-- As before, but looking at those orgs alone that have leases, active or parked lanes or arrivals, however many others there are.
create or replace function orgs_in_line(after_slug text, most integer, most_items integer)
  returns table (org_id bigint, slug text, in_use bigint, waiting bigint, oldest_s float8)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  with busy as materialized (
    select distinct b.org_id from (
      select e.org_id from lease e
      union all
      select s.org_id from share s where s.active
      union all
      select l.org_id from lane l where l.parked_on is not null and not l.active
      union all
      select a.org_id from arrival a
    ) b where nullif(current_setting('millpond.org', true), '') is null
  )
  select o.org_id, o.slug, e.in_use, d.waiting, greatest(0, extract(epoch from clock_timestamp()) - d.rank / 1e6)::float8
  from (
    select g.org_id, g.slug from busy b
    cross join lateral (select g.org_id, g.slug from org g where g.org_id = b.org_id offset 0) g
    where g.slug > after_slug order by g.slug offset 0
  ) o
  cross join lateral (select count(*) as in_use from lease e where e.org_id = o.org_id) e
  cross join lateral (
    select count(*) as waiting, min(w.rank) as rank from (
      select r.rank from (
        select n.lane_id, min(n.first_rank) as first_rank from (
          select l.lane_id, l.cursor_rank as first_rank from lane l where l.org_id = o.org_id and (l.active or l.parked_on is not null)
          union all
          select a.lane_id, a.min_rank from arrival a where a.org_id = o.org_id) n
        group by n.lane_id) n
      cross join lateral (select r.rank from ready r where r.org_id = o.org_id and r.lane_id = n.lane_id and r.rank >= n.first_rank
                          order by r.rank limit most_items) r
      limit most_items) w
  ) d
  where e.in_use > 0 or d.waiting > 0
  order by o.slug limit most
$$;
alter function lanes_of_other(bigint, text, text[], float8[], integer) owner to millpond_recorder;
revoke all on function lanes_of_other(bigint, text, text[], float8[], integer) from public;
do $$
begin
  execute format('revoke create on schema %I from millpond_recorder', current_schema());
end $$;
