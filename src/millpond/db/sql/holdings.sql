-- name: lock
-- Lets one transaction of an org at a time add what stands until it is deleted.
select pg_advisory_xact_lock(7741013, ($1::bigint % 2147483647)::int);

-- name: held
-- Counts what an org has until it is deleted.
select (select count(*) from knowledge_base k where k.org_id = $1) as knowledge_bases,
       (select count(*) from document d where d.org_id = $1) as documents,
       (select coalesce(sum(d.size_bytes), 0)::bigint from document d where d.org_id = $1) as storage_bytes;
