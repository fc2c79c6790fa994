-- name: take
-- Takes from buckets as much as is wanted and there; those that are new do not come back. Buckets are locked in order.
with now as materialized (select clock_timestamp() as at),
asked as (
  select bucket, wanted, per_s, most from unnest($1::text[], $2::float8[], $3::float8[], $4::float8[]) as u(bucket, wanted, per_s, most)
),
held as (
  select b.bucket, a.wanted, now.at,
         least(a.most, b.tokens + a.per_s * greatest(extract(epoch from now.at - b.at)::float8, 0)) as level
  from asked a join rate_bucket b on b.bucket = any(array[a.bucket]) cross join now
  order by b.bucket
  for update of b
)
update rate_bucket b set tokens = h.level - least(h.wanted, floor(h.level)), at = greatest(b.at, h.at)
from held h where b.bucket = any(array[h.bucket])
returning b.bucket, least(h.wanted, floor(h.level))::bigint as granted, b.tokens;

-- name: open
-- Makes buckets that are full.
insert into rate_bucket (bucket, tokens)
select u.bucket, u.most from unnest($1::text[], $2::float8[]) as u(bucket, most) order by u.bucket
on conflict (bucket) do nothing;

-- name: sweep
-- Removes buckets that nobody has asked for long enough to be full.
delete from rate_bucket where at < clock_timestamp() - interval '1 hour';
