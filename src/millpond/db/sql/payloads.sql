-- name: keep
-- Stores big values beside the rows that they belong to.
insert into payload (org_id, run_id, slot, body)
select * from unnest($1::bigint[], $2::uuid[], $3::text[], $4::json[])
on conflict (org_id, run_id, slot) do nothing;

-- name: read
-- Reads big values.
select p.org_id, p.run_id, p.slot, p.body
from unnest($1::bigint[], $2::uuid[], $3::text[]) as u(org_id, run_id, slot)
cross join lateral (
  select p.org_id, p.run_id, p.slot, p.body from payload p
  where p.org_id = u.org_id and p.run_id = u.run_id and p.slot = u.slot offset 0
) p;
