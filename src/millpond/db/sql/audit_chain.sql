-- name: logs_to_seal
-- Reads which orgs have rows to be sealed; 0 is the platform's own log.
select org_id from orgs_with_unsealed()
union all
select 0::bigint where exists (select from platform_audit_unsealed)
order by org_id;

-- name: all_orgs
-- Reads the next orgs by id.
select org_id, slug from org where org_id > $1 order by org_id limit $2;

-- name: is_new
-- Whether an org, or for 0 the whole installation, is so young that its log may well be empty.
select coalesce(min(created_at) > clock_timestamp() - interval '1 hour', true) from org where $1::bigint in (0, org_id);

-- name: lock
-- Lets one process at a time seal a log, until the transaction ends; false where another does.
select pg_try_advisory_xact_lock(hashtextextended('millpond.audit_seal:' || $1::bigint::text, 0));

-- name: head
-- Reads the newest seal of an org's log.
select seq, mac, key_id, sealed_at from audit_seal where org_id = $1 order by seq desc limit 1;

-- name: head_platform
-- Reads the newest seal of the platform's log.
select seq, mac, key_id, sealed_at from platform_audit_seal where $1::bigint = 0 order by seq desc limit 1;

-- name: unsealed
-- Reads rows of an org's log that are to be sealed, the seal before them and the time: the oldest by id, so that no backlog is read for each part.
select a.audit_id, a.at, a.subject, a.granted_by, a.action, a.resource, a.run_id, a.address,
       a.details::text as details, clock_timestamp() as now, h.seq as last_seq, h.mac as last_mac
from (select a.* from audit_unsealed u join audit a on a.org_id = u.org_id and a.audit_id = u.audit_id
      where u.org_id = $1 order by u.audit_id limit $2) a
left join lateral (select seq, mac from audit_seal where org_id = $1 order by seq desc limit 1) h on true
order by a.at, a.audit_id;

-- name: unsealed_platform
-- Reads rows of the platform's log that are to be sealed, and the time, as `unsealed`.
select a.audit_id, a.at, a.subject, null::text as granted_by, a.action, a.resource, null::uuid as run_id, a.address,
       a.details::text as details, clock_timestamp() as now, h.seq as last_seq, h.mac as last_mac
from (select a.* from platform_audit_unsealed u join platform_audit a on a.audit_id = u.audit_id
      where $1::bigint = 0 order by u.audit_id limit $2) a
left join lateral (select seq, mac from platform_audit_seal order by seq desc limit 1) h on true
order by a.at, a.audit_id;

-- name: seal
-- Stores seals of an org's rows and takes their marks away.
with sealed as (
  insert into audit_seal (org_id, seq, audit_id, mac, key_id, sealed_at)
  select $1, s.seq, s.audit_id, s.mac, $5, $6
  from unnest($2::bigint[], $3::uuid[], $4::bytea[]) as s (seq, audit_id, mac)
)
delete from audit_unsealed where org_id = $1 and audit_id = any($3);

-- name: seal_platform
-- Stores seals of the platform's rows and takes their marks away.
with sealed as (
  insert into platform_audit_seal (seq, audit_id, mac, key_id, sealed_at)
  select s.seq, s.audit_id, s.mac, $5, $6
  from unnest($2::bigint[], $3::uuid[], $4::bytea[]) as s (seq, audit_id, mac)
  where $1::bigint = 0
)
delete from platform_audit_unsealed where audit_id = any($3);

-- name: links
-- Reads the next seals of an org's log with their rows; a row that is gone is null.
select s.seq, s.audit_id, s.mac, s.key_id, s.sealed_at, a.audit_id is not null as has_row,
       a.at, a.subject, a.granted_by, a.action, a.resource, a.run_id, a.address, a.details::text as details
from audit_seal s
left join audit a on a.org_id = s.org_id and a.audit_id = s.audit_id
where s.org_id = $1 and s.seq > $2
order by s.seq
limit $3;

-- name: links_platform
-- Reads the next seals of the platform's log with their rows; a row that is gone is null.
select s.seq, s.audit_id, s.mac, s.key_id, s.sealed_at, a.audit_id is not null as has_row,
       a.at, a.subject, null::text as granted_by, a.action, a.resource, null::uuid as run_id, a.address,
       a.details::text as details
from platform_audit_seal s
left join platform_audit a on a.audit_id = s.audit_id
where $1::bigint = 0 and s.seq > $2
order by s.seq
limit $3;

-- name: mac_at
-- Reads the code of one seal of an org's log.
select mac from audit_seal where org_id = $1 and seq = $2;

-- name: mac_at_platform
-- Reads the code of one seal of the platform's log.
select mac from platform_audit_seal where $1::bigint = 0 and seq = $2;

-- name: waiting
-- Counts marked rows of an org's log: how many, the age of the oldest, one whose row is gone.
select count(*) as rows, extract(epoch from clock_timestamp() - min(a.at))::float8 as oldest_s,
       (array_agg(a.audit_id order by a.at) filter (where a.audit_id is not null))[1] as oldest_id,
       (array_agg(u.audit_id) filter (where a.audit_id is null))[1] as gone_id
from audit_unsealed u
left join audit a on a.org_id = u.org_id and a.audit_id = u.audit_id
where u.org_id = $1;

-- name: waiting_platform
-- Counts marked rows of the platform's log: how many, the age of the oldest, one whose row is gone.
select count(*) as rows, extract(epoch from clock_timestamp() - min(a.at))::float8 as oldest_s,
       (array_agg(a.audit_id order by a.at) filter (where a.audit_id is not null))[1] as oldest_id,
       (array_agg(u.audit_id) filter (where a.audit_id is null))[1] as gone_id
from platform_audit_unsealed u
left join platform_audit a on a.audit_id = u.audit_id
where $1::bigint = 0;

-- name: unmarked
-- Finds a row of an org's log that has neither seal nor mark: nothing would ever seal it.
select a.audit_id from audit a
where a.org_id = $1
  and not exists (select from audit_seal s where s.org_id = a.org_id and s.audit_id = a.audit_id)
  and not exists (select from audit_unsealed u where u.org_id = a.org_id and u.audit_id = a.audit_id)
limit 1;

-- name: unmarked_platform
-- Finds a row of the platform's log that has neither seal nor mark: nothing would ever seal it.
select a.audit_id from platform_audit a
where $1::bigint = 0
  and not exists (select from platform_audit_seal s where s.audit_id = a.audit_id)
  and not exists (select from platform_audit_unsealed u where u.audit_id = a.audit_id)
limit 1;

-- name: page
-- One page of an org's log by id: below $2, or above $3 where given; $5 to $10 are the members of the filter.
select a.audit_id, a.at, a.subject, a.granted_by, a.action, a.resource, a.run_id, a.address, a.details::text as details,
       s.seq, s.mac, s.key_id, s.sealed_at
from audit a
left join audit_seal s on s.org_id = a.org_id and s.audit_id = a.audit_id
where a.org_id = $1 and case when $3::uuid is null then a.audit_id < $2::uuid else a.audit_id > $3::uuid end
  and ($5::text is null or a.subject = $5) and ($6::text is null or starts_with(a.action, $6))
  and ($7::text is null or a.resource = $7) and ($8::uuid is null or a.run_id = $8)
  and ($9::timestamptz is null or a.at >= $9) and ($10::timestamptz is null or a.at < $10)
order by case when $3::uuid is null then a.audit_id end desc, a.audit_id
limit $4;

-- name: page_platform
-- One page of the platform's log by id, as `page`.
select a.audit_id, a.at, a.subject, null::text as granted_by, a.action, a.resource, null::uuid as run_id, a.address,
       a.details::text as details, s.seq, s.mac, s.key_id, s.sealed_at
from platform_audit a
left join platform_audit_seal s on s.audit_id = a.audit_id
where $1::bigint = 0 and case when $3::uuid is null then a.audit_id < $2::uuid else a.audit_id > $3::uuid end
  and ($5::text is null or a.subject = $5) and ($6::text is null or starts_with(a.action, $6))
  and ($7::text is null or a.resource = $7) and $8::uuid is null
  and ($9::timestamptz is null or a.at >= $9) and ($10::timestamptz is null or a.at < $10)
order by case when $3::uuid is null then a.audit_id end desc, a.audit_id
limit $4;
