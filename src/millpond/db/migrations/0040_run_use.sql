-- What runs used of tokens, kept for replays of limits as long as the runs are.

-- One row for each call that a record tells of; `keys` are what the model's name stands for. `is_lost`: the call was cut off,
-- and nobody knows what it used. Written with the record, never changed, deleted with the run.
create table run_use (
  org_id bigint,
  run_id uuid,
  use_id uuid,
  keys text[] not null,
  tokens bigint not null check (tokens >= 0),
  is_lost boolean not null default false,
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

-- Of runs made before this nobody knows what they used; of those made from now on it is recorded, also that they used none.
alter table run add column tells_use boolean not null default false;
alter table run alter column tells_use set default true;
grant select (urgency, tells_use) on run to millpond_recorder;

-- What a run used, by those of the keys `named` that it was used of.
create function run_used(org bigint, run uuid, named text[]) returns json
  language sql stable
  set search_path = millpond, pg_temp
as $$
  select coalesce(json_agg(json_build_object('keys', u.keys, 'tokens', u.tokens, 'is_lost', u.is_lost) order by u.keys), '[]')
  from (
    select array(select unnest(x.keys) intersect select unnest(named) order by 1) as keys,
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
do $$
begin
  execute format('revoke create on schema %I from millpond_recorder', current_schema());
end $$;
