-- Waits that are over while other strands of their run's attempt work.

-- name: over
-- Reads those of the given waits that are over (as can_go tells) where the lease holds; each limit keeps to looks by key.
select u.ord, s.kind, s.state, coalesce(s.output, p.body) as output, s.error, s.tries, s.name, s.seq, s.finished_at,
       extract(epoch from clock_timestamp() - s.started_at)::float8 as age_s, false as has_timer
from unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[]) with ordinality as u(org_id, item_id, token, step_key, ord)
cross join lateral (
  select i.run_id from item i where i.org_id = u.org_id and i.item_id = u.item_id and i.token = u.token limit 1
) i
cross join lateral (
  select s.* from step s where s.org_id = u.org_id and s.run_id = i.run_id and s.step_key = u.step_key
    and (s.state in ('done', 'failed')
         or s.state = 'retrying' and not exists (
           select from timer t where t.org_id = s.org_id and t.run_id = s.run_id
             and t.step_key = s.step_key offset 0)) limit 1
) s
left join lateral (
  select p.body from payload p where s.output is null and s.state = 'done' and p.org_id = s.org_id and p.run_id = s.run_id
    and p.slot = 'step:' || s.step_key limit 1
) p on true
order by u.ord;
