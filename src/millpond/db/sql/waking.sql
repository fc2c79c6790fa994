-- Waits that are over while other strands of their run's attempt work.

-- name: over
-- Reads how those of the given waits ended that are over, of runs whose lease still holds; the same test as can_go.
select u.ord, s.kind, s.state, coalesce(s.output, p.body) as output, s.error, s.tries, s.name, s.seq, s.finished_at,
       extract(epoch from clock_timestamp() - s.started_at)::float8 as age_s, false as has_timer
from unnest($1::bigint[], $2::uuid[], $3::uuid[], $4::text[]) with ordinality as u(org_id, item_id, token, step_key, ord)
join item i on i.org_id = u.org_id and i.item_id = u.item_id and i.token = u.token
join step s on s.org_id = i.org_id and s.run_id = i.run_id and s.step_key = u.step_key
left join payload p on s.output is null and s.state = 'done' and p.org_id = s.org_id and p.run_id = s.run_id
  and p.slot = 'step:' || s.step_key
where s.state in ('done', 'failed')
   or s.state = 'retrying' and not exists (
     select from timer t where t.org_id = s.org_id and t.run_id = s.run_id and t.step_key = s.step_key)
order by u.ord;
