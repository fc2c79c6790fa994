-- Access grants: operators of the platform whom an owner lets into an org for a while.

-- name: page
-- One page of grants by id: below $2, or above $3 where given; $5 is whether to leave out those that are over.
select g.grant_id, g.operator_id, a.email as operator_email, g.granted_by, g.reason, g.is_read_only, g.created_at,
       g.expires_at, g.ended_at, g.ended_at is null and g.expires_at > clock_timestamp() and a.is_operator as is_open
from access_grant g join account a on a.user_id = g.operator_id
where g.org_id = $1 and case when $3::uuid is null then g.grant_id < $2::uuid else g.grant_id > $3::uuid end
  and (not $5::boolean or (g.ended_at is null and g.expires_at > clock_timestamp()))
order by case when $3::uuid is null then g.grant_id end desc, g.grant_id
limit $4;

-- name: get
-- One grant.
select g.grant_id, g.operator_id, a.email as operator_email, g.granted_by, g.reason, g.is_read_only, g.created_at,
       g.expires_at, g.ended_at, g.ended_at is null and g.expires_at > clock_timestamp() and a.is_operator as is_open
from access_grant g join account a on a.user_id = g.operator_id
where g.org_id = $1 and g.grant_id = $2;

-- name: operator
-- The operator with an address, who stays one until this transaction ends.
select user_id from account where email = $1 and is_operator and disabled_at is null for share;

-- name: add
-- Lets an operator in for $7 hours.
insert into access_grant (org_id, grant_id, operator_id, granted_by, reason, is_read_only, expires_at)
values ($1, $2, $3, $4, $5, $6, clock_timestamp() + make_interval(hours => $7));

-- name: end
-- Ends a grant.
update access_grant set ended_at = clock_timestamp()
where org_id = $1 and grant_id = $2 and ended_at is null and expires_at > clock_timestamp()
returning grant_id;

-- name: end_all_of
-- Ends the grants of an account that is no operator's, in every org.
select org_id, grant_id from end_grants_of($1);

-- name: find_org
-- An org by id or slug.
select org_id from org where org_id::text = $1 or slug = $1 order by org_id::text = $1 desc limit 1;

-- name: open
-- The grant by which an operator is in an org now; one that lets them write goes first.
select grant_id, granted_by, is_read_only from access_grant
where org_id = $1 and operator_id = $2 and ended_at is null and expires_at > clock_timestamp()
order by is_read_only, expires_at desc limit 1;
