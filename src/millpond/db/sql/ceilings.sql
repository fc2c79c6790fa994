-- Limits as people set them: an org for itself, an operator for the platform. Read by the claim (limiting.sql).

-- name: own
-- What an org limits of its own.
select key, kind, maximum, period_s, burst, set_by, set_at, null::bigint as of_org, 'api' as source from org_limit
where org_id = $1 order by key, kind;

-- name: platform
-- What the platform limits; with $1, only what holds for that org.
select key, kind, maximum, period_s, burst, set_by, set_at, of_org, source from platform_limit
where $1::bigint is null or of_org is null or of_org = $1 order by key, kind;

-- name: declared
-- What settings and code declare; of a key and kind what goes first is first.
select key, kind, maximum, period_s, burst, set_by, set_at, of_org, source from declared_limit
order by key, kind, source = 'code', set_at desc, origin;

-- name: put_own
-- Sets a limit of an org.
insert into org_limit (org_id, key, kind, maximum, period_s, burst, set_by) values ($1, $2, $3, $4, $5, $6, $7)
on conflict (org_id, key, kind) do update
  set maximum = excluded.maximum, period_s = excluded.period_s, burst = excluded.burst, set_by = excluded.set_by,
      set_at = clock_timestamp();

-- name: lock_platform
-- Lets one transaction at a time change what the platform limits, until it ends.
select pg_advisory_xact_lock(hashtextextended('millpond.platform_limits', 0));

-- name: put_platform
-- Sets a limit of the platform, above what is declared.
insert into platform_limit (key, kind, maximum, period_s, burst, set_by, of_org) values ($1, $2, $3, $4, $5, $6, $7)
on conflict (key, kind) do update
  set maximum = excluded.maximum, period_s = excluded.period_s, burst = excluded.burst, set_by = excluded.set_by,
      set_at = clock_timestamp(), source = 'api';

-- name: remove_own
-- Removes a limit of an org.
delete from org_limit where org_id = $1 and key = $2 and kind = $3 returning key;

-- name: remove_platform
-- Removes a limit of the platform.
delete from platform_limit where key = $1 and kind = $2 returning source;

-- name: forget
-- Takes away what a source declares for a key and kind.
delete from declared_limit where key = $1 and kind = $2 and source = $3;

-- name: settle
-- Lets what is declared hold where no operator set a limit, and what is declared no more hold no longer; tells claims what has changed.
with best as materialized (
  select distinct on (d.key, d.kind) d.key, d.kind, d.maximum, d.period_s, d.burst, d.of_org, d.set_by, d.set_at, d.source
  from unnest($1::text[], $2::text[]) as u(key, kind) join declared_limit d on d.key = u.key and d.kind = u.kind
  order by d.key, d.kind, d.source = 'code', d.set_at desc, d.origin
),
gone as (
  delete from platform_limit p using unnest($1::text[], $2::text[]) as u(key, kind)
  where p.key = u.key and p.kind = u.kind and p.source <> 'api'
    and not exists (select from best b where b.key = p.key and b.kind = p.kind)
  returning p.key, p.kind
),
held as (
  insert into platform_limit as p (key, kind, maximum, period_s, burst, of_org, set_by, set_at, source)
  select key, kind, maximum, period_s, burst, of_org, set_by, set_at, source from best
  on conflict (key, kind) do update
    set maximum = excluded.maximum, period_s = excluded.period_s, burst = excluded.burst, of_org = excluded.of_org,
        set_by = excluded.set_by, set_at = excluded.set_at, source = excluded.source
    where p.source <> 'api' and (p.source, p.set_at) is distinct from (excluded.source, excluded.set_at)
  returning p.key, p.kind
)
select c.key, c.kind, limit_changed(0, c.key, c.kind) from (select key, kind from gone union all select key, kind from held) c;

-- name: changed
-- Tells claims that a limit is another one now (function of the migrations).
select limit_changed($1, $2, $3);

-- name: slug
-- What an org is called.
select slug from org where org_id = $1;

-- name: org_named
-- The org of a slug.
select org_id from org where slug = $1;

-- name: lane
-- What a lane counts on, and under which room it is parked.
select queue, capability, keys, case when not active then parked_on end as parked_on from lane where org_id = $1 and lane_id = $2;

-- name: holders
-- Work of an org under leases and tries of its steps, the oldest first, with what it counts on (a step's keys after an empty one).
select * from (
  (select e.run_id, l.queue, l.capability, l.keys, e.claimed_at, extract(epoch from clock_timestamp() - e.claimed_at)::float8 as age_s
   from lease e
   join lane l on l.org_id = e.org_id and l.lane_id = e.lane_id
   where e.org_id = $1 order by e.claimed_at limit 10000)
  union all
  (select e.run_id, l.queue, l.capability, l.keys || array[''] || s.keys, s.taken_at,
          extract(epoch from clock_timestamp() - s.taken_at)::float8
   from step_lease s
   join lease e on e.org_id = s.org_id and e.item_id = s.item_id and e.token = s.token
   join lane l on l.org_id = e.org_id and l.lane_id = e.lane_id
   where s.org_id = $1 and s.since_us is null order by s.taken_at limit 10000)
) h order by claimed_at limit 10000;

-- name: use
-- How full rooms were as the claim last parked work there, and how far their rates are used.
select room, in_use, maximum, looked_at, tat_us, pace, (extract(epoch from clock_timestamp()) * 1000000)::bigint as now_us
from room_use($1::text[]);

-- name: of_tokens
-- The limits on tokens that hold for an org.
select 0::bigint as owner, key, maximum, period_s, burst, of_org from platform_limit
where kind = 'tokens' and (of_org is null or of_org = $1)
union all
select org_id, key, maximum, period_s, burst, null from org_limit where org_id = $1 and kind = 'tokens';

-- name: turns
-- How an org stands in rooms that several queues need (function of the migrations).
select room, used_s, orgs from turn_of($1::text[], $2);
