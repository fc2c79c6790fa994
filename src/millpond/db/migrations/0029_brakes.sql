-- Brakes: what holds back work on a key after its provider said that it is asked too much, or failed too often.

-- Nothing on the key goes before `until_us`; then `factor` of what is allowed, growing with time until it is over (`over_us`).
-- `owner`: the org whose work alone it holds back, 0 for everybody's. A breaker is open since `opened_us`: it lets one probe
-- go at a time after `until_us`, until a step of that name succeeds. Written by workers, in the order of the changes of limits;
-- shown and taken away by the functions below alone. Global.
create table brake (
  owner bigint,
  key text check (length(key) between 3 and 500),
  until_us bigint not null,
  factor double precision not null check (factor > 0 and factor <= 1),
  in_use integer not null check (in_use >= 1),
  hits integer not null check (hits >= 0),
  opened_us bigint,
  over_us bigint not null check (over_us >= until_us),
  step text not null,
  reason text not null,
  primary key (owner, key)
);
create index brake_over on brake (over_us) where opened_us is null;
grant select, insert, update, delete on brake to millpond_engine;
grant execute on function limit_changed(bigint, text, text) to millpond_engine;

-- What holds back work of the org that asks, and of everybody; without an org only the latter.
create function brakes()
  returns table (owner bigint, key text, until_us bigint, factor double precision, in_use integer, hits integer,
                 opened_us bigint, step text, reason text, now_us bigint)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select b.owner, b.key, b.until_us, b.factor, b.in_use, b.hits, b.opened_us, b.step, b.reason, n.now_us
  from brake b, (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as now_us) n
  where b.owner in (0, nullif(current_setting('millpond.org', true), '')::bigint)
    and (b.opened_us is not null or b.over_us > n.now_us)
$$;
revoke all on function brakes() from public;
grant execute on function brakes() to millpond_app;

-- Takes a brake off: that of the org that asks, without an org that of everybody. Returns whether there was one.
create function release_brake(key text) returns boolean
  language plpgsql volatile security definer
  set search_path = millpond, pg_temp
as $$
declare
  asking bigint := coalesce(nullif(current_setting('millpond.org', true), '')::bigint, 0);
begin
  delete from brake b where b.owner = asking and b.key = release_brake.key;
  if not found then
    return false;
  end if;
  perform limit_changed(asking, key, 'brake');
  return true;
end
$$;
revoke all on function release_brake(text) from public;
grant execute on function release_brake(text) to millpond_app;

-- As before; there is something to decide also while there are brakes.
create or replace function claim_at_once(most integer, worker uuid, token uuid, queues text[], slots integer[], orgs integer[],
                              able text[], estimates float8[], depth integer)
  returns table (org_id bigint, item_id uuid, run_id uuid, attempt integer, token_now uuid, deaths smallint, tries smallint,
                 cancel_requested boolean, flow text, version integer, queue text, input json, subject text,
                 timeout_s float8, deadline_at timestamptz, is_rerun boolean, duties smallint, kind text, step_key text,
                 stamp integer, permission text, lent uuid, granted_by text)
  language plpgsql volatile rows 10
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
begin
  perform pg_advisory_xact_lock(7741001);
  if exists (select from room) or exists (select from platform_limit) or exists (select from org_limit)
     or exists (select from brake) then
    return query select 0::bigint, null::uuid, null::uuid, 0, null::uuid, null::smallint, null::smallint, null::boolean, null,
      null::int, null, null::json, null, null::float8, null::timestamptz, null::boolean, null::smallint, null, null,
      null::int, null, null::uuid, null;
    return;
  end if;
  return query select * from claim_all(most, worker, token, queues, slots, orgs, able, estimates, depth);
end
$$;
