-- The installation's keys, by their ids, and what they sealed.

-- name: lock_shared
-- Lets no rotation turn to another key until this transaction ends; held by whoever seals.
select pg_advisory_xact_lock_shared(hashtextextended('millpond.seal_key', 0));

-- name: lock
-- Waits for whoever seals, and lets one rotation at a time turn to another key.
select pg_advisory_xact_lock(hashtextextended('millpond.seal_key', 0));

-- name: current
-- Tells which key seals here; nothing on a database that has sealed nothing yet.
select key_id from seal_key where is_current;

-- name: keys
-- Reads all keys that ever sealed here.
select key_id, is_current, added_at, emptied_at, audit_sealed, audit_sealed_by from seal_key order by added_at, key_id;

-- name: add_first
-- Makes a key the first that seals here, unless another process was faster.
insert into seal_key (key_id, is_current) values ($1, true) on conflict do nothing;

-- name: other_hosts
-- Names hosts other than $1 that work here: of live workers, and other addresses of connections; the database's own is one.
with seen as (
  select case when a.client_addr <<= inet '127.0.0.0/8' or a.client_addr = inet '::1' then null else a.client_addr end as address
  from pg_stat_activity a
  where a.datname = current_database() and a.usename = current_user
    and a.application_name in ('millpond-api', 'millpond-steps')
),
ours as (
  select case when inet_client_addr() <<= inet '127.0.0.0/8' or inet_client_addr() = inet '::1' then null else inet_client_addr() end as address
)
select host from worker where expires_at > clock_timestamp() and host <> $1
union
select coalesce(host(s.address), 'the host of the database') from seen s, ours o where s.address is distinct from o.address
order by 1;

-- name: retire
-- Lets the current key seal no more.
update seal_key set is_current = false where is_current;

-- name: add
-- Makes a key the one that seals; it may have sealed here before.
insert into seal_key (key_id, is_current) values ($1, true)
on conflict (key_id) do update
  set is_current = true, added_at = clock_timestamp(), emptied_at = null, audit_sealed = null, audit_sealed_by = null;

-- name: keep_audit_key
-- Keeps what chained audit logs under an older key, sealed by key $3.
update seal_key set audit_sealed = $2, audit_sealed_by = $3 where key_id = $1;

-- name: emptied
-- Tells that nothing is sealed with the older keys any more.
update seal_key set emptied_at = clock_timestamp() where not is_current and emptied_at is null and key_id = any($1::text[])
returning key_id;

-- name: old_signing_keys
-- Locks signing keys that another key than $1 sealed, above $2.
select kid as id, private_sealed as sealed, seal_key_id from signing_key
where seal_key_id <> $1 and kid > $2 order by kid limit $3 for update;

-- name: reseal_signing_key
-- Stores a signing key as sealed by key $3.
update signing_key set private_sealed = $2, seal_key_id = $3 where kid = $1;

-- name: old_mails
-- Locks mails that another key than $1 sealed, above $2; one that is being sent is waited for.
select mail_id::text as id, sealed, seal_key_id from mail_outbox
where seal_key_id <> $1 and mail_id > coalesce(nullif($2::text, '')::uuid, '00000000-0000-0000-0000-000000000000'::uuid)
order by mail_id limit $3 for update;

-- name: reseal_mail
-- Stores a mail as sealed by key $3.
update mail_outbox set sealed = $2, seal_key_id = $3 where mail_id = $1::text::uuid;

-- name: old_secrets
-- Locks an org's secrets that another key than $2 sealed, above $3.
select secret_id::text as id, sealed, seal_key_id from secret
where org_id = $1 and seal_key_id <> $2
  and secret_id > coalesce(nullif($3::text, '')::uuid, '00000000-0000-0000-0000-000000000000'::uuid)
order by secret_id limit $4 for update;

-- name: reseal_secret
-- Stores a secret as sealed by key $4; its version stays.
update secret set sealed = $3, seal_key_id = $4 where org_id = $1 and secret_id = $2::text::uuid;
