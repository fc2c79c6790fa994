-- Rights: who may what now, in one org, and the lock under which that changes.

-- name: lock
-- Lets one transaction at a time change who may what in an org; held until it ends.
select pg_advisory_xact_lock(hashtextextended('millpond.rights', $1::bigint));

-- name: refuse_stale
-- Raises where the rights of who acts changed while it waited for the lock.
select refuse_stale($1, $2, $3, $4);

-- name: enter_org
-- Sets the org of the rest of a transaction that began without one.
select set_config('millpond.org', $1::bigint::text, true);

-- name: leave_org
-- Goes on without an org, for what is the platform's to change.
select set_config('millpond.org', '', true);

-- name: of_user
-- The role of a member now.
select m.role, m.version, c.permissions
from membership m
join account a on a.user_id = m.user_id and a.disabled_at is null
left join custom_role c on c.org_id = m.org_id and c.role = m.role
where m.org_id = $1 and m.user_id = $2;

-- name: of_service
-- The role of a service principal now.
select s.role, s.version, c.permissions
from service_principal s
left join custom_role c on c.org_id = s.org_id and c.role = s.role
where s.org_id = $1 and s.service_id = $2 and s.disabled_at is null;

-- name: of_outside
-- The role of an outside identity now.
select o.role, o.version, c.permissions
from outside_identity o
left join custom_role c on c.org_id = o.org_id and c.role = o.role
where o.org_id = $1 and o.identity_id = $2 and o.disabled_at is null and o.role is not null
  and issuer_stands(o.org_id, o.issuer, o.seen_at);

-- name: of_key
-- The owner and the scopes of a key that is good now.
select owner, scopes from api_key
where org_id = $1 and key_id = $2 and revoked_at is null and (expires_at is null or expires_at > clock_timestamp());

-- name: is_operator
-- Whether an account is an operator's now.
select exists (select from account where user_id = $1 and is_operator and disabled_at is null);

-- name: custom_role
-- What a custom role may.
select permissions from custom_role where org_id = $1 and role = $2;
