-- Outside issuers of tokens, and the identities that they vouch for.

-- name: page
-- One page of issuers by id: below $2, or above $3 where given; $5 is an address.
select i.issuer_id, i.name, i.url, i.audiences, i.algorithms, i.org_claim, i.org_values, i.trust_days, i.created_by,
       i.created_at, i.disabled_at,
       (select coalesce(json_agg(json_build_array(r.claim, r.claim_values, r.role) order by r.nth), '[]')
        from issuer_rule r where r.org_id = i.org_id and r.issuer_id = i.issuer_id) as rules
from issuer i
where i.org_id = $1 and case when $3::uuid is null then i.issuer_id < $2::uuid else i.issuer_id > $3::uuid end
  and ($5::text is null or i.url = $5)
order by case when $3::uuid is null then i.issuer_id end desc, i.issuer_id
limit $4;

-- name: get
-- One issuer.
select i.issuer_id, i.name, i.url, i.audiences, i.algorithms, i.org_claim, i.org_values, i.trust_days, i.created_by,
       i.created_at, i.disabled_at,
       (select coalesce(json_agg(json_build_array(r.claim, r.claim_values, r.role) order by r.nth), '[]')
        from issuer_rule r where r.org_id = i.org_id and r.issuer_id = i.issuer_id) as rules
from issuer i where i.org_id = $1 and i.issuer_id = $2;

-- name: at_address
-- The issuer that an org trusts at an address.
select i.issuer_id, i.name, i.url, i.audiences, i.algorithms, i.org_claim, i.org_values, i.trust_days, i.created_by,
       i.created_at, i.disabled_at,
       (select coalesce(json_agg(json_build_array(r.claim, r.claim_values, r.role) order by r.nth), '[]')
        from issuer_rule r where r.org_id = i.org_id and r.issuer_id = i.issuer_id) as rules
from issuer i where i.org_id = $1 and i.url = $2 and i.disabled_at is null;

-- name: count
-- Counts issuers.
select count(*) from issuer where org_id = $1;

-- name: add
-- Stores an issuer unless the org has one at its address.
insert into issuer (org_id, issuer_id, name, url, audiences, algorithms, org_claim, org_values, trust_days, created_by)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
on conflict (org_id, url) do nothing
returning issuer_id;

-- name: change
-- Changes an issuer.
update issuer
set name = $3, audiences = $4, algorithms = $5, org_claim = $6, org_values = $7, trust_days = $8,
    disabled_at = case when $9 then coalesce(disabled_at, clock_timestamp()) end
where org_id = $1 and issuer_id = $2;

-- name: remove
-- Removes an issuer with its rules; its identities stay, and stand on nothing.
delete from issuer where org_id = $1 and issuer_id = $2;

-- name: clear_rules
-- Removes an issuer's rules.
delete from issuer_rule where org_id = $1 and issuer_id = $2;

-- name: add_rule
-- Stores a rule at its place.
insert into issuer_rule (org_id, issuer_id, nth, claim, claim_values, role) values ($1, $2, $3, $4, $5, $6);

-- name: map_again
-- Gives identities of an issuer what its rules give now for their last token, nothing where $4; former rights are stale.
update outside_identity o
set version = nextval('rights_version'),
    role = case when not $4::boolean then (
      select r.role from issuer_rule r
      where r.org_id = o.org_id and r.issuer_id = $2 and r.claim = o.claim and o.claim_value = any (r.claim_values)
      order by r.nth limit 1) end
where o.org_id = $1 and o.issuer = $3;

-- name: identity
-- An identity by issuer and subject, with what its role may, and whether its being seen is to be remembered.
select o.identity_id, o.role, o.version, o.claim, o.claim_value, o.mapped_at, o.disabled_at, c.permissions,
       o.seen_at < clock_timestamp() - interval '1 hour' as is_sight_due
from outside_identity o
left join custom_role c on c.org_id = o.org_id and c.role = o.role
where o.org_id = $1 and o.issuer = $2 and o.outside_subject = $3;

-- name: link
-- Stores an identity that is seen for the first time.
insert into outside_identity
  (org_id, identity_id, issuer, outside_subject, label, role, claim, claim_value, mapped_at, version)
values ($1, $2, $3, $4, $5, $6, $7, $8, to_timestamp($9::double precision), nextval('rights_version'));

-- name: map
-- Gives an identity what its newest token says; what was given for another role is stale.
update outside_identity
set role = $3, claim = $4, claim_value = $5, mapped_at = to_timestamp($6::double precision),
    seen_at = clock_timestamp(),
    version = case when role is distinct from $3 then nextval('rights_version') else version end
where org_id = $1 and identity_id = $2;

-- name: seen
-- Remembers that an issuer vouches for an identity as before, by a token of this time.
update outside_identity
set seen_at = clock_timestamp(), mapped_at = greatest(mapped_at, to_timestamp($3::double precision))
where org_id = $1 and identity_id = $2;

-- name: identity_page
-- One page of identities by id: below $2, or above $3 where given; $5 is the issuer's address.
select identity_id, issuer, outside_subject, label, role, first_seen_at, seen_at, disabled_at from outside_identity
where org_id = $1 and case when $3::uuid is null then identity_id < $2::uuid else identity_id > $3::uuid end
  and ($5::text is null or issuer = $5)
order by case when $3::uuid is null then identity_id end desc, identity_id
limit $4;

-- name: get_identity
-- One identity.
select identity_id, issuer, outside_subject, label, role, first_seen_at, seen_at, disabled_at from outside_identity
where org_id = $1 and identity_id = $2;

-- name: disable
-- Disables or enables an identity; what it was given is stale.
update outside_identity
set version = nextval('rights_version'), disabled_at = case when $3 then coalesce(disabled_at, clock_timestamp()) end
where org_id = $1 and identity_id = $2;
