-- name: limits
-- Reads what an org is limited to, by name.
select jsonb_strip_nulls(p.limits || o.overrides) as limits
from org o join plan p on p.plan = coalesce(o.plan, (select d.plan from plan d where d.is_default))
where o.org_id = $1;

-- name: plans
-- Reads all plans.
select plan, limits, is_default from plan;

-- name: orgs_changed
-- Reads which plan and overrides orgs got since a time, and what time it is now.
select o.org_id, o.plan, o.overrides, o.plan_changed_at from org o where o.plan_changed_at >= $1;

-- name: open_count
-- Locks what an org has taken of a quota in the period ($3: day or month) that it is by the database's clock; makes the row if new.
insert into quota_count (org_id, quota, starts_at, ends_at)
select $1, $2, p.starts_at at time zone 'UTC', (p.starts_at + ('1 ' || $3)::interval) at time zone 'UTC'
from (select date_trunc($3, clock_timestamp() at time zone 'UTC') as starts_at) p
on conflict (org_id, quota, starts_at) do update set taken = quota_count.taken
returning starts_at, ends_at, taken, extract(epoch from ends_at - clock_timestamp())::float8 as left_s, xmax = 0 as is_new;

-- name: runs_since
-- Counts the runs of a period that began before anybody counted them; child runs and successors are their runs' own.
select count(*) from run
where org_id = $1 and created_at >= $2 and parent_id is null and continued_from is null
  and run_id >= $3;

-- name: lock_blocks
-- Locks blocks that nobody spends of at this moment: those named, or all of a quota in a period.
select block_id from quota_block
where org_id = $1 and ($2::uuid[] is not null and block_id = any($2) or $2::uuid[] is null and quota = $3 and starts_at = $4)
for update skip locked;

-- name: fold
-- Ends locked blocks: what was spent of them stays taken, the rest goes back.
with b as (
  delete from quota_block where org_id = $1 and block_id = any($2::uuid[]) returning block_id, quota, starts_at, size
),
s as (
  delete from quota_spend where org_id = $1 and block_id = any($2::uuid[]) returning block_id, amount
),
rest as (
  select b.quota, b.starts_at, sum(b.size - coalesce((select sum(s.amount) from s where s.block_id = b.block_id), 0)) as amount
  from b group by b.quota, b.starts_at
)
update quota_count c set taken = c.taken - rest.amount
from rest where c.org_id = $1 and c.quota = rest.quota and c.starts_at = rest.starts_at
returning c.quota, c.starts_at, c.taken;

-- name: take_block
-- Takes a block of the locked count.
with b as (
  insert into quota_block (org_id, block_id, quota, starts_at, ends_at, size) values ($1, $2, $3, $4, $5, $6)
)
update quota_count set taken = taken + $6 where org_id = $1 and quota = $3 and starts_at = $4;

-- name: take_now
-- Spends of the locked count at once.
update quota_count set taken = taken + $4 where org_id = $1 and quota = $2 and starts_at = $3;

-- name: used
-- Reads what an org has used of its quotas in the periods under way: taken, less what blocks still hold.
select c.quota, c.ends_at,
       c.taken - coalesce((select sum(b.size - coalesce((select sum(s.amount) from quota_spend s
                                                         where s.org_id = b.org_id and s.block_id = b.block_id), 0))
                           from quota_block b
                           where b.org_id = c.org_id and b.quota = c.quota and b.starts_at = c.starts_at), 0)::bigint as used
from quota_count c
where c.org_id = $1 and c.starts_at <= clock_timestamp() and c.ends_at > clock_timestamp();

-- name: standing
-- Reads which of some blocks stand.
select block_id from quota_block where org_id = $1 and block_id = any($2::uuid[]);

-- name: held
-- Tells whether blocks of a quota in a period have something left.
select exists (
  select from quota_block b
  where b.org_id = $1 and b.quota = $2 and b.starts_at = $3
    and b.size > coalesce((select sum(s.amount) from quota_spend s where s.org_id = b.org_id and s.block_id = b.block_id), 0)
);

-- name: lock_all_blocks
-- Locks all blocks of an org, when nobody spends of them any more.
select block_id from quota_block where org_id = $1 order by block_id for update;

-- name: lock_counts_of
-- Locks the counts that blocks are of, in the order in which others lock them.
select 1 from quota_count
where org_id = $1
  and (quota, starts_at) in (select b.quota, b.starts_at from quota_block b where b.org_id = $1 and b.block_id = any($2::uuid[]))
order by quota, starts_at for update;

-- name: lock_counts
-- Locks all counts of an org, in the order in which others lock them.
select 1 from quota_count where org_id = $1 order by quota, starts_at for update;

-- name: period
-- Tells when the period under way (day or month) ends.
select (date_trunc($1, clock_timestamp() at time zone 'UTC') + ('1 ' || $1)::interval) at time zone 'UTC' as ends_at;

-- name: spent_month
-- Reads what an org has spent on models in this month, and when the next one begins.
select least(coalesce(sum(u.input_tokens + u.output_tokens), 0), 9007199254740991)::bigint as tokens_per_month,
       least(coalesce(sum(u.cost_micros), 0), 9007199254740991)::bigint as cost_micros_per_month,
       m.ends_at
from (select date_trunc('month', clock_timestamp() at time zone 'UTC') as starts_at,
             (date_trunc('month', clock_timestamp() at time zone 'UTC') + interval '1 month') at time zone 'UTC' as ends_at) m
left join usage_day u on u.org_id = $1 and u.day >= m.starts_at::date
group by m.ends_at;

-- name: old_counts
-- Removes what was counted in periods over for long, with blocks that nobody gave back.
with b as (delete from quota_block where ends_at < clock_timestamp() - interval '1 hour' returning org_id, block_id),
s as (delete from quota_spend s using b where s.org_id = b.org_id and s.block_id = b.block_id)
delete from quota_count where ends_at < clock_timestamp() - interval '400 days';
