-- Members: who is in an org, with which role.

-- name: page
-- One page of members by id: below $2, or above $3 where given; $5 is a role, $6 an address.
select m.user_id, a.email, a.name, m.role, m.added_by, m.created_at, a.disabled_at
from membership m join account a on a.user_id = m.user_id
where m.org_id = $1 and case when $3::uuid is null then m.user_id < $2::uuid else m.user_id > $3::uuid end
  and ($5::text is null or m.role = $5) and ($6::text is null or a.email = $6)
order by case when $3::uuid is null then m.user_id end desc, m.user_id
limit $4;

-- name: get
-- One member.
select m.user_id, a.email, a.name, m.role, m.added_by, m.created_at, a.disabled_at
from membership m join account a on a.user_id = m.user_id
where m.org_id = $1 and m.user_id = $2;

-- name: of_email
-- Whether somebody with this address is a member.
select exists (select from membership m join account a on a.user_id = m.user_id where m.org_id = $1 and a.email = $2);

-- name: other_owners
-- Counts the owners besides one who can sign in.
select count(*) from membership m join account a on a.user_id = m.user_id
where m.org_id = $1 and m.role = 'owner' and m.user_id <> $2 and a.disabled_at is null;

-- name: add
-- Gives an account a place in an org.
insert into membership (org_id, user_id, role, version, added_by)
values ($1, $2, $3, nextval('rights_version'), $4)
on conflict (org_id, user_id) do nothing
returning user_id;

-- name: change_role
-- Gives a member another role; what was signed for the old one is stale.
update membership set role = $3, version = nextval('rights_version') where org_id = $1 and user_id = $2;

-- name: remove
-- Takes a member out of an org.
delete from membership where org_id = $1 and user_id = $2;
