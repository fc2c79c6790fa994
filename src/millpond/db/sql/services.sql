-- Service principals: programs that act in an org as themselves.

-- name: page
-- One page of service principals by id: below $2, or above $3 where given; $5 is a name.
select service_id, name, role, created_by, created_at, disabled_at from service_principal
where org_id = $1 and case when $3::uuid is null then service_id < $2::uuid else service_id > $3::uuid end
  and ($5::text is null or name = $5)
order by case when $3::uuid is null then service_id end desc, service_id
limit $4;

-- name: get
-- One service principal.
select service_id, name, role, created_by, created_at, disabled_at from service_principal
where org_id = $1 and service_id = $2;

-- name: add
-- Stores a service principal unless the org has one of its name.
insert into service_principal (org_id, service_id, name, role, version, created_by)
values ($1, $2, $3, $4, nextval('rights_version'), $5)
on conflict (org_id, name) do nothing
returning service_id;

-- name: is_taken
-- Whether another one has a name.
select exists (select from service_principal where org_id = $1 and name = $3 and service_id <> $2);

-- name: change
-- Changes a service principal; what it was given for the old rights is stale.
update service_principal
set name = $3, role = $4, version = nextval('rights_version'),
    disabled_at = case when $5 then coalesce(disabled_at, clock_timestamp()) end
where org_id = $1 and service_id = $2;
