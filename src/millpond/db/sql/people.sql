-- name: account_by_email
-- Reads who signs in, with what is checked.
select user_id, email, name, password_hash, is_operator, version, disabled_at is not null as is_disabled
from account where email = $1;

-- name: account
-- Reads somebody by id.
select user_id, email, name, password_hash, is_operator, version, disabled_at is not null as is_disabled
from account where user_id = $1;

-- name: hold_account
-- Holds an account as it was verified until the transaction ends: a change of its password waits, or was first and is seen.
select version from account
where user_id = $1 and password_hash = $2 and disabled_at is null for share;

-- name: add_account
-- Makes an account unless its address has one.
insert into account (user_id, email, name, password_hash) values ($1, $2, $3, $4)
on conflict (email) do nothing returning user_id;

-- name: add_operator
-- Makes the account of an operator.
insert into account (user_id, email, name, password_hash, is_operator) values ($1, $2, $3, $4, true) returning user_id;

-- name: make_operator
-- Makes the account of an address an operator with a new password.
update account set is_operator = true, password_hash = $2, name = $3, version = version + 1, disabled_at = null
where email = $1 returning user_id;

-- name: has_operator
-- Tells whether the platform has an operator.
select exists (select from account where is_operator and disabled_at is null);

-- name: lock_operators
-- Lets one transaction at a time decide who is an operator.
select pg_advisory_xact_lock(hashtextextended('millpond.operators', 0));

-- name: rehash
-- Keeps the same password under newer parameters.
update account set password_hash = $3 where user_id = $1 and password_hash = $2;

-- name: set_password
-- Replaces a password (one that is still `$3`, where given); what was signed before is refused where no org is set.
update account set password_hash = $2, version = version + 1 where user_id = $1 and disabled_at is null and ($3::text is null or password_hash = $3) returning version;

-- name: set_name
-- Replaces a name.
update account set name = $2 where user_id = $1;

-- name: seats
-- Reads in which orgs somebody is.
select org_id, slug, name, is_suspended, role, version, permissions from orgs_of_user($1);

-- name: seat_in
-- Somebody's place in one org, by its id or slug.
select org_id, slug, name, is_suspended, role, version, permissions from orgs_of_user($1)
where org_id::text = $2 or slug = $2 order by org_id::text = $2 desc limit 1;

-- name: add_session
-- Opens a session.
insert into login_session (session_id, user_id, address, agent, expires_at)
values ($1, $2, $3, $4, clock_timestamp() + make_interval(secs => $5));

-- name: add_refresh
-- Stores what a session is renewed with: until it is idle for too long, or over.
insert into refresh_token (digest, session_id, expires_at)
select $1, s.session_id, least(s.expires_at, clock_timestamp() + make_interval(secs => $3))
from login_session s where s.session_id = $2;

-- name: hold_session
-- Lets one transaction at a time renew a session or change what renews it.
select 1 from login_session where session_id = $1 for update;

-- name: hold_session_of_refresh
-- The same, by what renews it.
select 1 from login_session s where s.session_id = (select r.session_id from refresh_token r where r.digest = $1) for update;

-- name: use_refresh
-- Uses a refresh token; of several at once, one does.
update refresh_token set used_at = clock_timestamp()
where digest = $1 and used_at is null and expires_at > clock_timestamp() returning session_id;

-- name: used_refresh
-- Finds the live session of a refresh token that was used before.
select s.session_id, s.user_id from refresh_token r join login_session s on s.session_id = r.session_id
where r.digest = $1 and r.used_at is not null and s.revoked_at is null;

-- name: touch_session
-- Marks a live session as used and says whose it is.
update login_session set used_at = clock_timestamp()
where session_id = $1 and revoked_at is null and expires_at > clock_timestamp() returning user_id;

-- name: drop_refresh
-- Removes all refresh tokens of a session.
delete from refresh_token where session_id = $1;

-- name: session_of_refresh
-- Finds the live session of a refresh token.
select s.session_id, s.user_id from refresh_token r join login_session s on s.session_id = r.session_id
where r.digest = $1 and s.revoked_at is null;

-- name: sessions
-- Lists somebody's live sessions, newest first.
select s.session_id, s.address, s.agent, s.created_at, s.used_at, s.expires_at from login_session s
where s.user_id = $1 and s.revoked_at is null and s.expires_at > clock_timestamp()
  and exists (select from refresh_token r
              where r.session_id = s.session_id and r.used_at is null and r.expires_at > clock_timestamp())
order by s.created_at desc, s.session_id desc;

-- name: revoke_session
-- Ends one session of somebody.
update login_session set revoked_at = clock_timestamp(), revoked_why = $3
where session_id = $1 and user_id = $2 and revoked_at is null returning session_id;

-- name: revoke_sessions
-- Ends somebody's sessions but one (null: all).
update login_session set revoked_at = clock_timestamp(), revoked_why = $3
where user_id = $1 and session_id is distinct from $2 and revoked_at is null returning session_id;

-- name: add_token
-- Stores a single-use token.
insert into single_use_token (digest, purpose, email, name, user_id, expires_at)
values ($1, $2, $3, $4, $5, clock_timestamp() + make_interval(secs => $6));

-- name: take_token
-- Uses a single-use token; of several at once, one does.
delete from single_use_token where digest = $1 and purpose = any($2::text[]) and expires_at > clock_timestamp()
returning purpose, email, name, user_id;

-- name: drop_tokens_of_user
-- Makes all links to reset somebody's password useless.
delete from single_use_token where user_id = $1;

-- name: drop_operator_tokens
-- Makes earlier links for an operator useless.
delete from single_use_token where purpose in ('operator', 'operator_reset');

-- name: has_operator_token
-- Tells whether a link for an operator works.
select exists (select from single_use_token
               where purpose in ('operator', 'operator_reset') and expires_at > clock_timestamp());

-- name: brake
-- Counts a try; no row when the allowance of `$3` tries, one more every `$2` seconds, is used up.
insert into auth_brake as b (key, arrival_at) values ($1, clock_timestamp() + make_interval(secs => $2))
on conflict (key) do update
set arrival_at = greatest(b.arrival_at, clock_timestamp()) + make_interval(secs => $2)
where greatest(b.arrival_at, clock_timestamp()) + make_interval(secs => $2)
   <= clock_timestamp() + make_interval(secs => $2 * $3)
returning key;

-- name: brake_wait
-- Says in how many seconds the next try is let through.
select greatest(0, extract(epoch from arrival_at - clock_timestamp()) - $2 * ($3 - 1))::float8 as wait_s
from auth_brake where key = $1;

-- name: release_brake
-- Forgets the tries of one who turned out to be right.
delete from auth_brake where key = $1;

-- name: add_mail
-- Lets a mail wait to be sent.
insert into mail_outbox (mail_id, seal_key_id, sealed, expires_at)
values ($1, $2, $3, clock_timestamp() + make_interval(secs => $4));

-- name: claim_mail
-- Takes the mail that is due longest for `$1` seconds, in which nobody else takes it.
update mail_outbox set due_at = clock_timestamp() + make_interval(secs => $1), tries = tries + 1
where mail_id = (select mail_id from mail_outbox where due_at <= clock_timestamp()
                 order by due_at for update skip locked limit 1)
returning mail_id, sealed, seal_key_id, tries, expires_at <= clock_timestamp() as is_too_old;

-- name: postpone_mail
-- Lets a mail that could not be sent wait a while.
update mail_outbox set due_at = clock_timestamp() + make_interval(secs => $2) where mail_id = $1;

-- name: drop_mail
-- Removes a mail that is done with.
delete from mail_outbox where mail_id = $1;

-- name: sweep
-- Removes what no longer matters: brakes that are off, links that expired, sessions that ended a month ago.
with brakes as (delete from auth_brake where arrival_at < clock_timestamp() - interval '1 hour'),
     links as (delete from single_use_token where expires_at < clock_timestamp() - interval '1 day')
delete from login_session where expires_at < clock_timestamp() - interval '30 days';
