-- Organizations: the tenants themselves, what each decides for itself, and the operators of the platform.

-- name: page
-- One page of orgs by id: below $1, or above $2 where given; $4 is a slug, $5 whether suspended.
select org_id, slug, name, created_at, suspended_at, suspended_reason from org
where case when $2::bigint is null then org_id < $1::bigint else org_id > $2::bigint end
  and ($4::text is null or slug = $4) and ($5::boolean is null or (suspended_at is not null) = $5)
order by case when $2::bigint is null then org_id end desc, org_id
limit $3;

-- name: get
-- One org.
select org_id, slug, name, created_at, suspended_at, suspended_reason from org where org_id = $1;

-- name: add
-- Makes an org unless its slug is taken; spends no id when it is.
insert into org (slug, name)
select $1, $2 where not exists (select from org where slug = $1)
on conflict (slug) do nothing
returning org_id;

-- name: rename
-- Gives an org another name.
update org set name = $2 where org_id = $1;

-- name: suspend
-- Suspends an org.
update org set suspended_at = coalesce(suspended_at, clock_timestamp()), suspended_reason = $2 where org_id = $1;

-- name: unsuspend
-- Lets a suspended org go on.
update org set suspended_at = null, suspended_reason = null where org_id = $1;

-- name: policy
-- What an org decided for itself.
select may_resolve_own, invitation_days, email_domains from org_policy where org_id = $1;

-- name: put_policy
-- Stores what an org decides for itself.
insert into org_policy (org_id, may_resolve_own, invitation_days, email_domains) values ($1, $2, $3, $4)
on conflict (org_id) do update
set may_resolve_own = excluded.may_resolve_own, invitation_days = excluded.invitation_days,
    email_domains = excluded.email_domains, updated_at = clock_timestamp();

-- name: lock_operators
-- Lets one transaction at a time change who is an operator; held until it ends.
select pg_advisory_xact_lock(hashtextextended('millpond.operators', 0));

-- name: operators
-- All operators of the platform, newest account first.
select user_id, email, name, created_at, disabled_at from account where is_operator order by user_id desc;

-- name: operator
-- One operator.
select user_id, email, name, created_at, disabled_at from account where user_id = $1 and is_operator;

-- name: account_of
-- The account of an address that can sign in.
select user_id, is_operator from account where email = $1 and disabled_at is null;

-- name: set_operator
-- Makes an account an operator's, or no more; what was signed before is stale.
update account set is_operator = $2, version = version + 1 where user_id = $1 and is_operator <> $2 returning user_id;

-- name: other_operators
-- Counts the operators besides one who can sign in.
select count(*) from account where is_operator and user_id <> $1 and disabled_at is null;
