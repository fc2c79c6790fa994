-- name: add_org
-- Makes an org unless its slug is taken; spends no id when it is.
insert into org (slug, name)
select $1, $2 where not exists (select from org where slug = $1)
on conflict (slug) do nothing;

-- name: org_id
-- Reads the id of an org by its slug.
select org_id from org where slug = $1;

-- name: lock_signing_keys
-- Lets one process at a time make the first key; held until the transaction ends.
select pg_advisory_xact_lock(hashtextextended('millpond.signing_key', 0));

-- name: signing_keys
-- Reads the keys that tokens may name, newest first: current ones, and retired ones until their last token expires.
select kid, algorithm, public_jwk, private_sealed, seal_key_id, retired_at is null as is_current
from signing_key
where retired_at is null or retired_at > clock_timestamp() - interval '1 day'
order by retired_at is null desc, created_at desc, kid;

-- name: add_signing_key
-- Stores a new key.
insert into signing_key (kid, algorithm, public_jwk, private_sealed, seal_key_id)
values ($1, 'EdDSA', $2::json, $3, $4);

-- name: retire_signing_keys
-- Lets no present key sign any more.
update signing_key set retired_at = clock_timestamp() where retired_at is null;

-- name: end_signing_keys
-- Ends the overlap of keys that no longer sign: their tokens are refused.
update signing_key set retired_at = retired_at - interval '1 day'
where retired_at > clock_timestamp() - interval '1 day';

-- name: all_signing_keys
-- Lists keys without what they are made of.
select kid, created_at, retired_at,
       case when retired_at is null then 'current'
            when retired_at > clock_timestamp() - interval '1 day' then 'overlapping' else 'ended' end as state
from signing_key order by created_at desc, kid;
