-- Custom roles: sets of permissions that an org named.

-- name: list
-- All custom roles by name.
select role, description, permissions, created_at from custom_role where org_id = $1 order by role;

-- name: get
-- One custom role.
select role, description, permissions, created_at from custom_role where org_id = $1 and role = $2;

-- name: count
-- Counts custom roles.
select count(*) from custom_role where org_id = $1;

-- name: put
-- Makes or replaces a custom role.
insert into custom_role (org_id, role, description, permissions) values ($1, $2, $3, $4)
on conflict (org_id, role) do update set description = excluded.description, permissions = excluded.permissions;

-- name: bump_members
-- Makes stale what was signed for members with a role.
update membership set version = nextval('rights_version') where org_id = $1 and role = $2;

-- name: bump_services
-- Makes stale what service principals with a role were given.
update service_principal set version = nextval('rights_version') where org_id = $1 and role = $2;

-- name: bump_outside
-- Makes stale what outside identities with a role were given.
update outside_identity set version = nextval('rights_version') where org_id = $1 and role = $2;

-- name: holders
-- Counts who holds a role, or is asked to join with it.
select (select count(*) from membership where org_id = $1 and role = $2)
     + (select count(*) from service_principal where org_id = $1 and role = $2)
     + (select count(*) from outside_identity where org_id = $1 and role = $2 and disabled_at is null)
     + (select count(*) from issuer_rule where org_id = $1 and role = $2)
     + (select count(*) from invitation where org_id = $1 and role = $2 and accepted_at is null and revoked_at is null
          and expires_at > clock_timestamp());

-- name: delete
-- Removes a custom role.
delete from custom_role where org_id = $1 and role = $2;
