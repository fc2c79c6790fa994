-- What workers tell of providers that are asked too much or fail.

-- name: lock
-- Lets one worker at a time change brakes.
select pg_advisory_xact_lock(7741003);

-- name: carried
-- Which keys a leased work item counts on, and which its run's flow declares.
select l.keys, coalesce(v.keys, '{}') as declared
from lease e join lane l on l.org_id = any(array[e.org_id]) and l.lane_id = any(array[e.lane_id])
join run r on r.org_id = any(array[e.org_id]) and r.run_id = any(array[e.run_id])
left join flow_version v on v.flow = r.flow and v.version = r.version
where e.org_id = $1 and e.item_id = $2 and e.token = $3;

-- name: holds
-- Whether a work item is leased still.
select exists (select from lease where org_id = $1 and item_id = $2 and token = $3);

-- name: opened
-- Breakers that a step of this name, which counts on $5 and declares $6 of it, has opened, and that a success in this work item, on no other such key, closes; the time.
select b.owner, b.key, b.until_us, b.factor, b.in_use, b.hits, b.opened_us, b.step, b.reason,
       (extract(epoch from clock_timestamp()) * 1000000)::bigint as now_us
from lease e join lane l on l.org_id = any(array[e.org_id]) and l.lane_id = any(array[e.lane_id])
join run r on r.org_id = any(array[e.org_id]) and r.run_id = any(array[e.run_id])
left join flow_version v on v.flow = r.flow and v.version = r.version
join brake b on b.opened_us is not null and b.step = $4
  and (b.owner = 0 and (b.key = any(v.keys) or b.key = any($6::text[]))
       or b.owner = e.org_id and (b.key = any(l.keys) or b.key = any($5::text[]) or not exists (
         select from unnest(l.keys || $5::text[]) k where split_part(k, ':', 1) = split_part(b.key, ':', 1))))
where e.org_id = $1 and e.item_id = $2 and e.token = $3;

-- name: now
-- The brake on a key as it is (none: no key), the time, how much is under way on the key, and how many brakes the owner has.
select b.key, b.until_us, b.factor, b.in_use, b.hits, b.opened_us, b.step, b.reason,
       (extract(epoch from clock_timestamp()) * 1000000)::bigint as now_us,
       ((select count(*) from lease e join lane l on l.org_id = any(array[e.org_id]) and l.lane_id = any(array[e.lane_id])
         where $2::text = any(l.keys) and $1::bigint in (0, e.org_id))
        + (select count(*) from step_lease s join lease e on e.org_id = any(array[s.org_id])
          and e.item_id = any(array[s.item_id]) and e.token = s.token
           where s.since_us is null and $2::text = any(s.keys) and $2::text <> all(e.keys) and $1::bigint in (0, e.org_id)))::int as under_way,
       (select count(*) from brake o where o.owner = $1)::int as brakes
from (select) n left join brake b on b.owner = $1 and b.key = $2;

-- name: put
-- Stores a brake.
insert into brake (owner, key, until_us, factor, in_use, hits, opened_us, over_us, step, reason)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
on conflict (owner, key) do update
  set until_us = excluded.until_us, factor = excluded.factor, in_use = excluded.in_use, hits = excluded.hits,
      opened_us = excluded.opened_us, over_us = excluded.over_us, step = excluded.step, reason = excluded.reason;

-- name: changed
-- Tells claims of a brake (function of the migrations).
select limit_changed($1, $2, 'brake');

-- name: counted
-- Ends the row of failures by which a breaker opened.
delete from failing where owner = $1 and key = $2 and step = $3;

-- name: drop_over
-- Deletes brakes that are over, and tells claims of it; and rows of failures that were broken off, so many microseconds ago.
with f as (
  delete from failing where failed_us < (extract(epoch from clock_timestamp()) * 1000000)::bigint - $1
),
d as (
  delete from brake where over_us < (extract(epoch from clock_timestamp()) * 1000000)::bigint
  returning owner, key
)
select count(*) from (select limit_changed(owner, key, 'brake') from d order by owner, key) c;
