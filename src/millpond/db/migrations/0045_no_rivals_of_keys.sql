-- Charges of crossings and what is found by its key go by key whatever the planner thought of tables (0044).

-- At first the strongest lock that is needed below: who waits for it gives way after seconds, before anything is built.
lock table run, step_need, live_key, input_request in access exclusive mode;

create or replace function charge_crossings(orgs bigint[], queues text[], rooms text[], seconds float8[]) returns void
  language plpgsql volatile
  set search_path = millpond, pg_temp
as $$
begin
  perform pg_advisory_xact_lock(7741001);
  update crossing_share x set virtual_s = x.virtual_s + u.virtual_s
  from (
    select u.org_id, u.room, sum(u.seconds / s.weight) as virtual_s
    from unnest(orgs, queues, rooms, seconds) as u(org_id, queue, room, seconds)
    join share s on s.org_id = any(array[u.org_id]) and s.queue = any(array[u.queue])
    group by u.org_id, u.room
  ) u
  where x.org_id = any(array[u.org_id]) and x.room = any(array[u.room]);
  update crossing c set virtual_s = m.virtual_s
  from (
    select u.room, (select max(x.virtual_s) from crossing_share x where x.room = u.room) as virtual_s
    from (select distinct u.room from unnest(rooms, seconds) as u(room, seconds) where u.seconds < 0) u
  ) m
  where c.room = any(array[m.room]) and m.virtual_s < c.virtual_s;
end
$$;

-- Over an empty table all indexes cost the same, and the newest is taken, whichever columns are bound: the runs of an org
-- were looked through by flow for one that is known by its id. An index that may be used only where its own column is bound
-- (`is not null` follows from `=`, and from nothing else) is no rival of the key.
create index run_of_flow on run (org_id, flow, run_id desc) where flow is not null;
drop index run_by_flow;
alter index run_of_flow rename to run_by_flow;
create unique index step_need_by_id on step_need (org_id, need_id) where need_id is not null;
drop index step_need_id;
alter index step_need_by_id rename to step_need_id;
create index live_key_by_run on live_key (org_id, run_id) where run_id is not null;
drop index live_key_of_run;
alter index live_key_by_run rename to live_key_of_run;
create index input_request_by_run on input_request (org_id, run_id) where run_id is not null;
drop index input_request_of_run;
alter index input_request_by_run rename to input_request_of_run;
