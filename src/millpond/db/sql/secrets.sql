-- Secrets of organizations: sealed values that the API takes and never gives out.

-- name: page
-- One page of secrets by id: below $2, or above $3 where given; $5 is a name.
select secret_id, name, description, version, created_by, created_at, changed_by, changed_at, used_at from secret
where org_id = $1 and case when $3::uuid is null then secret_id < $2::uuid else secret_id > $3::uuid end
  and ($5::text is null or name = $5)
order by case when $3::uuid is null then secret_id end desc, secret_id
limit $4;

-- name: get
-- One secret by its name, without its value.
select secret_id, name, description, version, created_by, created_at, changed_by, changed_at, used_at from secret
where org_id = $1 and name = $2;

-- name: add
-- Stores a secret unless the org has one of its name.
insert into secret (org_id, secret_id, name, description, sealed, seal_key_id, created_by, changed_by)
values ($1, $2, $3, $4, $5, $6, $7, $7)
on conflict (org_id, name) do nothing
returning secret_id;

-- name: lock
-- Locks a secret that is about to change.
select secret_id, description from secret where org_id = $1 and name = $2 for update;

-- name: replace
-- Stores another value of a secret.
update secret set sealed = $3, seal_key_id = $4, description = $5, version = version + 1, changed_by = $6,
  changed_at = clock_timestamp()
where org_id = $1 and secret_id = $2;

-- name: remove
-- Removes a secret; its value is gone with the row.
delete from secret where org_id = $1 and name = $2 returning secret_id;

-- name: sealed
-- Reads a secret to be opened.
select secret_id, version, sealed, seal_key_id, used_at < clock_timestamp() - interval '1 minute' or used_at is null as is_due
from secret where org_id = $1 and name = $2;

-- name: used
-- Tells that a secret was opened, at most once a minute; one that is being changed is not waited for.
update secret set used_at = clock_timestamp()
where org_id = $1 and secret_id = (
  select secret_id from secret where org_id = $1 and secret_id = $2 for update skip locked);
