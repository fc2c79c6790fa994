-- name: lock
-- Lets one transaction of an org at a time add what stands until it is deleted.
select pg_advisory_xact_lock(7741013, ($1::bigint % 2147483647)::int);

-- name: held
-- Counts what an org has until it is deleted, of the things named; of all others null.
select case when 'knowledge_bases' = any($2::text[]) then (select count(*) from knowledge_base t where t.org_id = $1) end
         as knowledge_bases,
       case when 'documents' = any($2) then (select count(*) from document t where t.org_id = $1) end as documents,
       case when 'storage_bytes' = any($2)
         then (select coalesce(sum(t.size_bytes), 0)::bigint from document t where t.org_id = $1) end as storage_bytes,
       case when 'members' = any($2)
         then (select count(*) from membership t where t.org_id = $1)
              + (select count(*) from invitation t where t.org_id = $1 and t.accepted_at is null and t.revoked_at is null
                   and t.expires_at > clock_timestamp()) end as members,
       case when 'api_keys' = any($2)
         then (select count(*) from api_key t where t.org_id = $1 and t.revoked_at is null
                 and (t.expires_at is null or t.expires_at > clock_timestamp())) end as api_keys,
       case when 'service_principals' = any($2)
         then (select count(*) from service_principal t where t.org_id = $1 and t.disabled_at is null) end
         as service_principals,
       case when 'custom_roles' = any($2) then (select count(*) from custom_role t where t.org_id = $1) end as custom_roles,
       case when 'outside_issuers' = any($2) then (select count(*) from issuer t where t.org_id = $1) end as outside_issuers,
       case when 'schedules' = any($2) then (select count(*) from schedule t where t.org_id = $1) end as schedules,
       case when 'triggers' = any($2) then (select count(*) from trigger t where t.org_id = $1) end as triggers,
       case when 'secrets' = any($2) then (select count(*) from secret t where t.org_id = $1) end as secrets;
