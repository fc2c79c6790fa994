-- API keys: what programs send; only digests are stored.

-- name: page
-- One page of keys by id: below $2, or above $3 where given; $5 is an owner, $6 whether those that are over are left out.
select key_id, name, prefix, owner, scopes, created_by, created_at, expires_at, used_at, revoked_at from api_key
where org_id = $1 and case when $3::uuid is null then key_id < $2::uuid else key_id > $3::uuid end
  and ($5::text is null or owner = $5)
  and (not $6::boolean or (revoked_at is null and (expires_at is null or expires_at > clock_timestamp())))
order by case when $3::uuid is null then key_id end desc, key_id
limit $4;

-- name: get
-- One key.
select key_id, name, prefix, owner, scopes, created_by, created_at, expires_at, used_at, revoked_at from api_key
where org_id = $1 and key_id = $2;

-- name: add
-- Stores a key that ends after $9 days, or never.
insert into api_key (org_id, key_id, name, prefix, digest, owner, scopes, created_by, expires_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp() + make_interval(days => $9));

-- name: revoke
-- Ends a key.
update api_key set revoked_at = clock_timestamp() where org_id = $1 and key_id = $2 and revoked_at is null returning key_id;

-- name: revoke_of
-- Ends all keys of an owner.
update api_key set revoked_at = clock_timestamp() where org_id = $1 and owner = $2 and revoked_at is null
returning key_id, name, prefix;

-- name: owner_of
-- The owner of a key that is good now.
select owner from api_key
where org_id = $1 and key_id = $2 and revoked_at is null and (expires_at is null or expires_at > clock_timestamp());

-- name: read
-- Good keys by their prefixes, with what their owners may now; the version is null where the owner is gone or disabled.
select k.key_id, k.prefix, k.digest, k.scopes, o.slug, coalesce(m.role, s.role, x.role) as role,
       coalesce(m.version, s.version, x.version) as version, c.permissions,
       k.used_at is null or k.used_at < clock_timestamp() - interval '1 minute' as is_use_due
from api_key k
join org o on o.org_id = k.org_id
left join membership m on m.org_id = k.org_id and split_part(k.owner, ':', 1) = 'user'
  and m.user_id = split_part(k.owner, ':', 2)::uuid
  and exists (select from account a where a.user_id = m.user_id and a.disabled_at is null)
left join service_principal s on s.org_id = k.org_id and split_part(k.owner, ':', 1) = 'service'
  and s.service_id = split_part(k.owner, ':', 2)::uuid and s.disabled_at is null
left join outside_identity x on x.org_id = k.org_id and split_part(k.owner, ':', 1) = 'outside'
  and x.identity_id = split_part(k.owner, ':', 2)::uuid and x.disabled_at is null and x.role is not null
  and issuer_stands(x.org_id, x.issuer, x.seen_at)
left join custom_role c on c.org_id = k.org_id and c.role = coalesce(m.role, s.role, x.role)
where k.org_id = $1 and k.prefix = any($2::text[]) and k.revoked_at is null and (k.expires_at is null or k.expires_at > clock_timestamp());

-- name: used
-- Remembers that a key was used, unless that was remembered within the last minute.
update api_key set used_at = clock_timestamp()
where org_id = $1 and key_id = $2 and (used_at is null or used_at < clock_timestamp() - interval '1 minute');
