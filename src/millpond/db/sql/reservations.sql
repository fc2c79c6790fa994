-- Tokens that leases have of limits; read and written by the claim, after its lock.

-- name: settle
-- Takes in what work used, gives up the reservations of leases that are gone, tells what is awaited (function of the migrations).
select room, capability, delta, used from claim_tokens();

-- name: reserve
-- Stores how many tokens leases have of limits, and tries of steps under them.
insert into reservation as r (org_id, item_id, token, step_key, room, tokens, capability, carried, parts)
select l.org_id, l.item_id, l.token, u.step_key, u.room, u.tokens, u.capability, string_to_array(u.carried, chr(31)),
       string_to_array(u.parts, chr(31))
from unnest($1::bigint[], $2::uuid[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[])
  as u(org_id, item_id, step_key, room, tokens, capability, carried, parts)
join lease l on l.org_id = any(array[u.org_id]) and l.item_id = any(array[u.item_id])
on conflict (org_id, item_id, token, room, step_key) do update set tokens = r.tokens + excluded.tokens;

-- name: drop_unlimited
-- Deletes what is left of limits on tokens where there are none any more.
with n as materialized (
  select from (select) x
  where not exists (select from platform_limit where kind = 'tokens') and not exists (select from org_limit where kind = 'tokens')
),
r as (
  delete from reservation r using n
  where not exists (select from lease l where l.org_id = r.org_id and l.item_id = r.item_id and l.token = r.token)
  returning 1
),
u as (
  delete from lease_use u using n
  where not exists (select from reservation r where r.org_id = u.org_id and r.item_id = u.item_id and r.token = u.token)
  returning 1
)
select (select count(*) from r) + (select count(*) from u);
