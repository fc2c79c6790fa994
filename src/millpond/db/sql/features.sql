-- Features: what plans have switched off.

-- name: without
-- Which of some orgs have a feature switched off, by themselves or by their plan.
select o.org_id
from org o join plan p on p.plan = coalesce(o.plan, (select d.plan from plan d where d.is_default))
where o.org_id = any($1::bigint[]) and (p.features || o.features) -> $2 = 'false'::jsonb;
