-- name: list
-- Reads all plans, with how many orgs were given each.
select p.plan, p.title, p.limits, p.features, p.is_default, p.changed_at, (select count(*) from org o where o.plan = p.plan) as orgs
from plan p order by p.plan;

-- name: lock
-- Lets one transaction at a time change plans.
select pg_advisory_xact_lock(7741014);

-- name: put
-- Makes or replaces a plan; tells whether it is new.
insert into plan as p (plan, title, limits, is_default, features) values ($1, $2, $3, $4, $5)
on conflict (plan) do update
  set title = excluded.title, limits = excluded.limits, features = excluded.features, is_default = p.is_default or excluded.is_default,
      changed_at = clock_timestamp()
returning xmax = 0;

-- name: no_default
-- Takes it from a plan to be that of orgs without one.
update plan set is_default = false where is_default and plan <> $1;

-- name: delete
-- Removes a plan that no org has and that is not the default one.
delete from plan p where p.plan = $1 and not p.is_default and not exists (select from org o where o.plan = p.plan)
returning p.plan;

-- name: exists
-- Tells whether there is a plan.
select exists (select from plan where plan = $1);

-- name: of_org
-- Reads an org's plan and what it has instead of its plan's limits.
select coalesce(o.plan, p.plan) as plan, o.plan is null as is_default, o.overrides, jsonb_strip_nulls(p.limits || o.overrides) as limits,
       o.features as feature_overrides, p.features || o.features as features
from org o join plan p on p.plan = coalesce(o.plan, (select d.plan from plan d where d.is_default))
where o.org_id = $1;

-- name: set_of_org
-- Gives an org a plan (null: the default one), overrides, and features of its own.
update org set plan = $2, overrides = $3, features = $4, plan_changed_at = clock_timestamp() where org_id = $1;

-- name: prices
-- Reads what models cost.
select model, input_micros, output_micros, changed_at from model_price order by model;

-- name: put_price
-- Sets what a model costs from now on.
insert into model_price (model, input_micros, output_micros) values ($1, $2, $3)
on conflict (model) do update
  set input_micros = excluded.input_micros, output_micros = excluded.output_micros, changed_at = clock_timestamp()
returning model, input_micros, output_micros, changed_at;

-- name: delete_price
-- Lets a model cost nothing from now on.
delete from model_price where model = $1 returning model;

-- name: usage
-- Sums an org's usage of days, by what is asked for ($6 day, $7 flow, $8 model); what is not is null.
select case when $6::bool then u.day end as day, case when $7::bool then u.flow end as flow,
       case when $8::bool then u.model end as model,
       sum(u.runs)::bigint as runs, sum(u.worker_s)::float8 as worker_s, least(sum(u.input_tokens), 9007199254740991)::bigint as input_tokens,
       least(sum(u.output_tokens), 9007199254740991)::bigint as output_tokens, least(sum(u.cost_micros), 9007199254740991)::bigint as cost_micros
from usage_day u
where u.org_id = $1 and u.day between $2 and $3 and ($4::text is null or u.flow = $4) and ($5::text is null or u.model = $5)
group by 1, 2, 3 order by 1 desc nulls last, 2, 3
limit $9;

-- name: today
-- Tells which day (UTC) it is.
select (clock_timestamp() at time zone 'UTC')::date;
