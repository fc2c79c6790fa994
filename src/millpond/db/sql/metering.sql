-- name: spend
-- Stores what runs spent on models, at today's prices (none: it costs nothing), for replays, and for the next claim where tokens are reserved.
with told as (
  insert into lease_use (org_id, item_id, token, keys, tokens, is_lost, step_key, carried)
  select u.org_id, u.item_id, u.token, string_to_array(u.keys, chr(31)), u.input_tokens + u.output_tokens, u.is_cut,
         u.step_key, string_to_array(u.carried, chr(31))
  from unnest($2::bigint[], $5::bigint[], $6::bigint[], $7::uuid[], $8::uuid[], $9::text[], $10::bool[], $11::text[], $12::text[])
    as u(org_id, input_tokens, output_tokens, item_id, token, keys, is_cut, step_key, carried)
  where exists (select from reservation r where r.org_id = u.org_id and r.item_id = u.item_id and r.token = u.token offset 0)
),
kept as (
  insert into run_use (org_id, run_id, use_id, keys, tokens, is_lost, carried)
  select u.org_id, u.run_id, u.use_id, string_to_array(u.keys, chr(31)), u.input_tokens + u.output_tokens, u.is_cut,
         string_to_array(u.carried, chr(31))
  from unnest($1::uuid[], $2::bigint[], $3::uuid[], $5::bigint[], $6::bigint[], $9::text[], $10::bool[], $12::text[])
    as u(use_id, org_id, run_id, input_tokens, output_tokens, keys, is_cut, carried)
)
insert into usage_part (part_id, orgs, flows, models, input_tokens, output_tokens, cost_micros)
select u.part_id, array[u.org_id], array[r.flow], array[u.model], array[u.input_tokens], array[u.output_tokens],
       array[least(coalesce(round((u.input_tokens::numeric * p.input_micros + u.output_tokens::numeric * p.output_micros)
                                  / 1000000), 0), 9007199254740991)::bigint]
from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::text[], $5::bigint[], $6::bigint[], $10::bool[])
  as u(part_id, org_id, run_id, model, input_tokens, output_tokens, is_cut)
cross join lateral (select r.flow from run r where r.org_id = u.org_id and r.run_id = u.run_id offset 0) r
left join model_price p on p.model = u.model
where not u.is_cut;

-- name: fold
-- Adds parts (one, or as many as $1, with $3 those alone that tell of models) to their days, locked in order, up to JSON's largest number; returns how many there were. Lost in a crash, it is done again.
with parts as (
  delete from usage_part where part_id in (
    select part_id from usage_part where ($2::uuid is null or part_id = $2) and (models is not null or not $3::boolean)
    limit $1 for update skip locked)
  returning at, orgs, flows, models, runs, worker_s, input_tokens, output_tokens, cost_micros
),
sums as (
  select u.org_id, (p.at at time zone 'UTC')::date as day, u.flow, coalesce(u.model, '') as model,
         coalesce(sum(u.runs), 0) as runs, coalesce(sum(u.worker_s), 0) as worker_s,
         least(coalesce(sum(u.input_tokens), 0), 9007199254740991)::bigint as input_tokens,
         least(coalesce(sum(u.output_tokens), 0), 9007199254740991)::bigint as output_tokens,
         least(coalesce(sum(u.cost_micros), 0), 9007199254740991)::bigint as cost_micros
  from parts p
  cross join lateral unnest(p.orgs, p.flows, p.models, p.runs, p.worker_s, p.input_tokens, p.output_tokens, p.cost_micros)
    as u(org_id, flow, model, runs, worker_s, input_tokens, output_tokens, cost_micros)
  group by 1, 2, 3, 4
  order by 1, 2, 3, 4
),
added as (
  insert into usage_day as d (org_id, day, flow, model, runs, worker_s, input_tokens, output_tokens, cost_micros)
  select org_id, day, flow, model, runs, worker_s, input_tokens, output_tokens, cost_micros from sums
  on conflict (org_id, day, flow, model) do update
    set runs = d.runs + excluded.runs, worker_s = d.worker_s + excluded.worker_s,
        input_tokens = least(d.input_tokens + excluded.input_tokens, 9007199254740991),
        output_tokens = least(d.output_tokens + excluded.output_tokens, 9007199254740991),
        cost_micros = least(d.cost_micros + excluded.cost_micros, 9007199254740991)
)
select count(*), set_config('synchronous_commit', 'off', true) from parts;

-- name: part_ids
-- Reads which parts there are.
select part_id from usage_part limit $1;

-- name: drop_part
-- Removes a part that cannot be added.
delete from usage_part where part_id = $1;
