-- Invitations: addresses that were asked to join an org.

-- name: page
-- One page of invitations by id: below $2, or above $3 where given; $5 is a state, $6 an address.
select invitation_id, email, role, invited_by, is_of_platform, created_at, sent_at, expires_at, accepted_at, accepted_by,
       revoked_at, state
from (select i.*, case when accepted_at is not null then 'accepted' when revoked_at is not null then 'revoked'
                       when expires_at <= clock_timestamp() then 'expired' else 'open' end as state
      from invitation i where i.org_id = $1) as i
where case when $3::uuid is null then invitation_id < $2::uuid else invitation_id > $3::uuid end
  and ($5::text is null or state = $5) and ($6::text is null or email = $6)
order by case when $3::uuid is null then invitation_id end desc, invitation_id
limit $4;

-- name: get
-- One invitation.
select invitation_id, email, role, invited_by, is_of_platform, created_at, sent_at, expires_at, accepted_at, accepted_by,
       revoked_at, case when accepted_at is not null then 'accepted' when revoked_at is not null then 'revoked'
                        when expires_at <= clock_timestamp() then 'expired' else 'open' end as state
from invitation where org_id = $1 and invitation_id = $2;

-- name: of_email
-- The invitation of an address that was neither accepted nor revoked.
select invitation_id, role from invitation
where org_id = $1 and email = $2 and accepted_at is null and revoked_at is null;

-- name: add
-- Stores an invitation that ends after $8 days.
insert into invitation (org_id, invitation_id, email, role, digest, invited_by, is_of_platform, expires_at)
values ($1, $2, $3, $4, $5, $6, $7, clock_timestamp() + make_interval(days => $8));

-- name: renew
-- Gives an open invitation another token and a new end; who sends it again answers for it.
update invitation
set digest = $3, invited_by = $4, is_of_platform = $5, sent_at = clock_timestamp(),
    expires_at = clock_timestamp() + make_interval(days => $6)
where org_id = $1 and invitation_id = $2 and accepted_at is null and revoked_at is null
returning invitation_id;

-- name: revoke
-- Takes an invitation back.
update invitation set revoked_at = clock_timestamp()
where org_id = $1 and invitation_id = $2 and accepted_at is null and revoked_at is null
returning invitation_id;

-- name: good
-- The invitation of a token that can be accepted now by an address.
select invitation_id, role, invited_by, is_of_platform from invitation
where org_id = $1 and digest = $2 and email = $3 and accepted_at is null and revoked_at is null
  and expires_at > clock_timestamp();

-- name: accept
-- Ends an invitation by its acceptance.
update invitation set accepted_at = clock_timestamp(), accepted_by = $3
where org_id = $1 and invitation_id = $2 and accepted_at is null and revoked_at is null
returning invitation_id;

-- name: account_email
-- The address of an account that can sign in.
select email from account where user_id = $1 and disabled_at is null;

-- name: address
-- Reads whom an open invitation is for, and what it promises.
select email, role, invited_by, is_of_platform from invitation
where org_id = $1 and digest = $2 and accepted_at is null and revoked_at is null and expires_at > clock_timestamp();
