-- Limits of the platform that settings and code declare; what of them holds is settled in ceilings.sql.

-- name: stored
-- What origins of a source have declared.
select origin, key, kind, maximum, period_s, burst, of_org from declared_limit
where source = $1 and origin = any($2::text[]) order by origin, key, kind;

-- name: declare
-- Stores what an origin declares for a key and kind, as the newest there is.
insert into declared_limit (source, origin, key, kind, maximum, period_s, burst, of_org, set_by)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
on conflict (key, kind, source, origin) do update
  set maximum = excluded.maximum, period_s = excluded.period_s, burst = excluded.burst, of_org = excluded.of_org,
      set_by = excluded.set_by, set_at = clock_timestamp();

-- name: take_back
-- Takes away what an origin declares no more.
delete from declared_limit where source = $1 and origin = $2 and key = $3 and kind = $4;

-- name: holding
-- Which source has what holds for keys and kinds.
select p.key, p.kind, p.source from unnest($1::text[], $2::text[]) as u(key, kind)
join platform_limit p on p.key = u.key and p.kind = u.kind;
