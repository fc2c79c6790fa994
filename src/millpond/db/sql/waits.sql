-- name: record_wait
-- Stores a step that waits, unless it is recorded already.
insert into step (org_id, run_id, step_key, name, kind, state, attempt, started_at, seq)
values ($1, $2, $3, $4, $5, 'waiting', $6, clock_timestamp(), $7)
on conflict (org_id, run_id, step_key) do nothing
returning step_key;

-- name: set_timer
-- Sets what becomes true after so many seconds; a newer timer of the same step replaces an older one.
insert into timer (org_id, run_id, step_key, kind, due_at)
values ($1, $2, $3, $4, clock_timestamp() + $5 * interval '1 second')
on conflict (org_id, run_id, step_key) do update set kind = excluded.kind, due_at = excluded.due_at
returning due_at;

-- name: ask
-- Stores a question to a human.
insert into input_request (org_id, request_id, run_id, step_key, role, title, form, proposal, digest, expires_at,
                           expiry_answer, kind)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, clock_timestamp() + $10 * interval '1 second', $11, $12);

-- name: can_go
-- Tells whether any of the waits that a run parks on is over; asked under the live row's lock.
select exists (
  select from step s
  where s.org_id = $1 and s.run_id = $2 and s.step_key = any($3::text[])
    and (s.state in ('done', 'failed')
         or s.state = 'retrying' and not exists (
           select from timer t where t.org_id = s.org_id and t.run_id = s.run_id and t.step_key = s.step_key offset 0)));

-- name: unlease
-- Gives the lease back, and stores what was used under it; the caller holds it locked.
with gone as (
  delete from lease l where l.org_id = $1 and l.item_id = $2 and l.token = $3
  returning l.org_id, l.item_id, l.run_id, l.attempt, extract(epoch from clock_timestamp() - l.claimed_at)::float8 as worker_s
)
insert into usage_part (orgs, flows, runs, worker_s)
select array_agg(r.org_id), array_agg(r.flow), array_agg((l.attempt = 1 and l.item_id = l.run_id)::int), array_agg(l.worker_s)
from gone l cross join lateral (select r.org_id, r.flow from run r where r.org_id = l.org_id and r.run_id = l.run_id offset 0) r
having count(*) > 0;

-- name: rest
-- Lets the locked live row wait in the given state, with the event that tells of it; what came so far alone is no suspect.
with i as (
  update item set state = $3, token = null, event_no = event_no + 1, tries = tries + $6::smallint,
                  deaths = case when lane_id & 2 = 2 then 0 else deaths end, lane_id = lane_id & ~2::bigint,
                  duties = duties | case when $6::smallint > 0 then 1::smallint else 0::smallint end
  where org_id = $1 and item_id = $2 returning event_no
)
insert into event (org_id, run_id, event_no, kind, data)
select $1, $2, i.event_no, $4, $5::json from i;

-- name: rest_all
-- Lets locked live rows wait, but those for which one of these steps is over; leases go, what was used is stored, events tell of it.
with u as materialized (
  select * from unnest($1::int[], $2::bigint[], $3::uuid[], $4::uuid[], $5::text[], $6::json[])
    as u(nth, org_id, run_id, token, state, data)
),
over as materialized (
  select u.nth from unnest($7::int[], $8::text[]) as k(nth, step_key) join u on u.nth = k.nth
  cross join lateral (
    select from step s
    where s.org_id = u.org_id and s.run_id = u.run_id and s.step_key = k.step_key
      and (s.state in ('done', 'failed')
           or s.state = 'retrying' and not exists (
             select from timer t where t.org_id = s.org_id and t.run_id = s.run_id and t.step_key = s.step_key offset 0))
    offset 0
  ) s
),
r as materialized (select u.* from u where u.nth not in (select o.nth from over o)),
gone as (
  delete from lease l using r where l.org_id = any(array[r.org_id]) and l.item_id = any(array[r.run_id]) and l.token = r.token
  returning l.org_id, l.item_id, l.run_id, l.attempt, extract(epoch from clock_timestamp() - l.claimed_at)::float8 as worker_s
),
used as (
  insert into usage_part (orgs, flows, runs, worker_s)
  select array_agg(g.org_id), array_agg(g.flow), array_agg(g.runs), array_agg(g.worker_s)
  from (select f.org_id, f.flow, (count(*) filter (where l.attempt = 1))::int as runs, sum(l.worker_s) as worker_s
        from gone l cross join lateral (select r.org_id, r.flow from run r where r.org_id = l.org_id and r.run_id = l.run_id offset 0) f
        group by f.org_id, f.flow) g
  having count(*) > 0
),
i as (
  update item i set state = r.state, token = null, event_no = i.event_no + 1,
                    deaths = case when i.lane_id & 2 = 2 then 0 else i.deaths end, lane_id = i.lane_id & ~2::bigint
  from r where i.org_id = any(array[r.org_id]) and i.item_id = any(array[r.run_id])
  returning r.nth, i.org_id, i.item_id, i.event_no, r.state, r.data
),
events as (
  insert into event (org_id, run_id, event_no, kind, data)
  select org_id, item_id, event_no, 'run.' || state, data from i
)
select nth from i;

-- name: clear_suspect
-- Lets a locked work item that came to a wait alone be executed beside others again.
update item set deaths = 0, lane_id = lane_id & ~2::bigint where org_id = $1 and item_id = $2 and lane_id & 2 = 2;

-- name: ready
-- Queues locked work items, unless blocked, in their resumed lane (first starts in their own), with events if given.
with t as materialized (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as us),
n as (
  update item i
  set lane_id = case when i.state = 'scheduled' then i.lane_id else i.lane_id | 1 end
                | case when i.deaths + u.deaths >= $8 then 2 else 0 end,
      state = 'queued', token = null, rank = t.us + u.ord, deaths = i.deaths + u.deaths,
      event_no = i.event_no + case when u.event_kind is null then 0 else 1 end
  from t, unnest($1::bigint[], $2::uuid[], $3::text[], $4::text[], $5::int[])
    with ordinality as u(org_id, item_id, event_kind, event_data, deaths, ord)
  where i.org_id = any(array[u.org_id]) and i.item_id = any(array[u.item_id]) and i.state <> 'queued' and i.blocked is null
  returning i.org_id, i.item_id, i.run_id, i.lane_id, i.rank, i.event_no, i.queue, i.capability, i.keys, u.event_kind,
            u.event_data
),
queued as (
  insert into ready (org_id, lane_id, rank, item_id) select org_id, lane_id, rank, item_id from n
),
events as (
  insert into event (org_id, run_id, event_no, kind, data)
  select org_id, run_id, event_no, event_kind, event_data::json from n where event_kind is not null
),
arrived as (
  insert into arrival (org_id, lane_id, queue, capability, keys, offset_us, min_rank)
  select n.org_id, n.lane_id, coalesce(n.queue, r.queue),
         coalesce(n.capability, r.flow || '@' || r.version) || case when n.lane_id & 2 = 2 then $9 else '' end,
         coalesce(n.keys, r.keys),
         -r.priority * $6::bigint - case when n.lane_id & 1 = 1 then $7::bigint else 0 end - (r.urgency is not null)::int, min(n.rank)
  from n join run r on r.org_id = any(array[n.org_id]) and r.run_id = any(array[n.run_id])
  group by 1, 2, 3, 4, 5, 6
)
select n.org_id, n.run_id, coalesce(n.queue, r.queue) from n join run r on r.org_id = any(array[n.org_id])
  and r.run_id = any(array[n.run_id]);

-- name: due
-- Finds timers whose time has come, earliest first; deadlines are seen to elsewhere.
select org_id, run_id, step_key, kind from timer
where due_at <= clock_timestamp() and kind <> 'deadline' order by due_at limit $1;

-- name: lock_items
-- Locks live rows that nobody else holds.
select u.org_id, u.run_id, i.state
from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
cross join lateral (select i.state from item i where i.org_id = u.org_id and i.item_id = u.run_id
                    for update skip locked) i;

-- name: take_timers
-- Removes due timers of locked runs; only those returned take effect.
delete from timer t using unnest($1::bigint[], $2::uuid[], $3::text[]) as u(org_id, run_id, step_key)
where t.org_id = any(array[u.org_id]) and t.run_id = any(array[u.run_id]) and t.step_key = any(array[u.step_key])
  and t.due_at <= clock_timestamp()
returning t.org_id, t.run_id, t.step_key, t.kind;

-- name: sweep_timers
-- Removes due timers whose run is no more.
delete from timer t using unnest($1::bigint[], $2::uuid[], $3::text[]) as u(org_id, run_id, step_key)
where t.org_id = any(array[u.org_id]) and t.run_id = any(array[u.run_id]) and t.step_key = any(array[u.step_key])
  and not exists (select from item i where i.org_id = t.org_id and i.item_id = t.run_id offset 0);

-- name: end_sleeps
-- Records sleeps as over, each with its event.
with s as (
  update step s set state = 'done', finished_at = clock_timestamp()
  from unnest($1::bigint[], $2::uuid[], $3::text[]) as u(org_id, run_id, step_key)
  where s.org_id = any(array[u.org_id]) and s.run_id = any(array[u.run_id]) and s.step_key = any(array[u.step_key])
    and s.state = 'waiting'
  returning s.org_id, s.run_id, s.step_key, s.name
),
c as materialized (
  select s.*, row_number() over (partition by org_id, run_id order by step_key) as nth,
         count(*) over (partition by org_id, run_id) as many from s
),
i as (
  update item i set event_no = i.event_no + c.many from c
  where c.nth = 1 and i.org_id = any(array[c.org_id]) and i.item_id = any(array[c.run_id])
  returning i.org_id, i.item_id, i.event_no - c.many as base
)
insert into event (org_id, run_id, event_no, kind, step_key, data)
select c.org_id, c.run_id, i.base + c.nth, 'sleep.ended', c.step_key, json_build_object('name', c.name)
from c join i on i.org_id = c.org_id and i.item_id = c.run_id;

-- name: end_signal_waits
-- Records waits for signals as over by time, each with its event.
with s as (
  update step s set state = 'failed', finished_at = clock_timestamp(),
    error = json_build_object('class', 'SignalTimedOut', 'code', 'signal_timed_out',
                              'message', 'no signal came in time')
  from unnest($1::bigint[], $2::uuid[], $3::text[]) as u(org_id, run_id, step_key)
  where s.org_id = any(array[u.org_id]) and s.run_id = any(array[u.run_id]) and s.step_key = any(array[u.step_key])
    and s.state = 'waiting'
  returning s.org_id, s.run_id, s.step_key, s.input
),
c as materialized (
  select s.*, row_number() over (partition by org_id, run_id order by step_key) as nth,
         count(*) over (partition by org_id, run_id) as many from s
),
i as (
  update item i set event_no = i.event_no + c.many from c
  where c.nth = 1 and i.org_id = any(array[c.org_id]) and i.item_id = any(array[c.run_id])
  returning i.org_id, i.item_id, i.event_no - c.many as base
)
insert into event (org_id, run_id, event_no, kind, step_key, data)
select c.org_id, c.run_id, i.base + c.nth, 'signal.timed_out', c.step_key, json_build_object('names', c.input->'names')
from c join i on i.org_id = c.org_id and i.item_id = c.run_id;

-- name: get_request
-- Reads what a decision on a question needs.
select run_id, step_key, role, title, form, proposal, digest, state, expiry_answer, kind,
       coalesce(expires_at <= clock_timestamp(), false) as is_expired
from input_request where org_id = $1 and request_id = $2;

-- name: request_of_step
-- Finds the question that a step asked.
select request_id from input_request where org_id = $1 and run_id = $2 and step_key = $3 and state = 'pending';

-- name: lock_run
-- Locks the live row of one run.
select state from item where org_id = $1 and item_id = $2 for update;

-- name: answer_request
-- Consumes a pending question, once.
update input_request set state = $3, answer = $4, resolved_by = $5, resolved_at = clock_timestamp()
where org_id = $1 and request_id = $2 and state = 'pending'
returning request_id;

-- name: end_wait
-- Records how a waiting step ended.
update step set state = $4, output = $5, error = $6, finished_at = clock_timestamp()
where org_id = $1 and run_id = $2 and step_key = $3 and state = 'waiting'
returning name;

-- name: drop_timer
-- Removes the timer of a step.
delete from timer where org_id = $1 and run_id = $2 and step_key = $3;

-- name: history
-- Reads recorded steps of runs, with results that stand apart; a retry that is not due yet carries when it is.
select s.org_id, s.run_id, s.step_key, s.kind, s.state, coalesce(s.output, p.body) as output, s.error, s.tries, s.name,
       s.seq, s.finished_at,
       extract(epoch from clock_timestamp() - s.started_at)::float8 as age_s,
       t.due_at is not null as has_timer
from unnest($1::bigint[], $2::uuid[]) as u(org_id, run_id)
join step s on s.org_id = any(array[u.org_id]) and s.run_id = any(array[u.run_id])
left join timer t on t.org_id = any(array[s.org_id]) and t.run_id = any(array[s.run_id])
  and t.step_key = any(array[s.step_key])
left join payload p on s.output is null and s.state = 'done' and p.org_id = any(array[s.org_id])
  and p.run_id = any(array[s.run_id])
  and p.slot = any(array['step:' || s.step_key]);

-- name: is_own_run
-- Whether the same person stands behind a run and behind $3, by themselves, a key or a program, and the org forbids that.
with recursive behind as (
  (select 'run' as side, unnest(array_append(behind, subject)) as subject from run where org_id = $1 and run_id = $2
   union all
   select 'me', $3::text)
  union
  -- A key is its owner's, a service its maker's.
  select b.side, o.subject
  from behind b
  cross join lateral (
    select k.owner as subject from api_key k where k.org_id = $1 and b.subject = 'key:' || k.key_id
    union all
    select k.created_by from api_key k where k.org_id = $1 and b.subject = 'key:' || k.key_id
    union all
    select s.created_by from service_principal s where s.org_id = $1 and b.subject = 'service:' || s.service_id
  ) o
)
select not may_resolve_own() and exists (
  select from behind r join behind m on m.subject = r.subject where r.side = 'run' and m.side = 'me'
);

-- name: retrying_s
-- Tells how long ago the body of a run's flow was first put off for a further try.
select extract(epoch from clock_timestamp() - min(at))::float8 from event
where org_id = $1 and run_id = $2 and kind = 'run.retrying';

-- name: now
-- Tells the time.
select clock_timestamp();
