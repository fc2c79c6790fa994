-- name: submit_plain
-- Stores one run that starts at once, and has nothing that few runs have, as `submit` stores each of many. By itself ($19) it enters the org; it asks again about a caller ($20 to $23) and takes the price from blocks ($24); $15 is what its first event tells.
with runs as (
  insert into run (org_id, run_id, flow, version, queue, subject, priority, keys, timeout_s, traceparent, labels, input, created_at,
                   stamp, permission)
  values ($1::bigint, $2::uuid, $3::text, $4::int, $5::text, $6::text, $7::int, string_to_array($8::text, E'\x1f'), $9::float8,
          $10::text, $11::json, $12::json, statement_timestamp(), $17::int, $18::text)
),
items as (
  insert into item (org_id, item_id, run_id, state, lane_id, rank, event_no, duties)
  values ($1, $2, $2, 'queued', $13::bigint, (date_part('epoch', statement_timestamp()) * 1000000)::bigint, 1, $16::smallint)
),
queued as (
  insert into ready (org_id, lane_id, rank, item_id)
  values ($1, $13, (date_part('epoch', statement_timestamp()) * 1000000)::bigint, $2)
),
arrived as (
  insert into arrival (org_id, lane_id, queue, capability, keys, offset_us, min_rank)
  values ($1, $13, $5, $3 || '@' || $4, string_to_array($8, E'\x1f'), $14::bigint, (date_part('epoch', statement_timestamp()) * 1000000)::bigint)
)
-- Executed before what stands above it, so that the org is entered by then: else nothing would be stored, but an error raised.
insert into event (org_id, run_id, event_no, kind, data, at)
values (case when $20::text is not null or $24::uuid[] is not null then open_submit($1, $19::boolean, $20, $21::int, $22::uuid, $23::uuid, $24)
             when $19 then set_config('millpond.org', $1::text, true)::bigint
             else $1 end,
        $2, 1, 'run.queued', $15::json, statement_timestamp());

-- name: submit_one
-- The same for one run that has something of what few have, in $25 and $26: the columns for that take longer to set up than to write.
with runs as (
  insert into run (org_id, run_id, flow, version, queue, subject, priority, keys, timeout_s, traceparent, labels, input, created_at,
                   dedup_key, parent_id, parent_key, close_policy, rerun_of, rerun_from, continued_from, stamp, permission, lent,
                   granted_by, behind, urgency)
  values ($1::bigint, $2::uuid, $3::text, $4::int, $5::text, $6::text, $7::int, string_to_array($8::text, E'\x1f'), $9::float8,
          $10::text, $11::json, $12::json, statement_timestamp(), $26::json->>'dedup_key', ($26->>'parent_id')::uuid,
          $26->>'parent_key', $26->>'close_policy', ($26->>'rerun_of')::uuid, $26->>'rerun_from', ($26->>'continued_from')::uuid,
          $17::int, $18::text, ($26->>'lent')::uuid, $26->>'granted_by', $25::text[], $26->>'urgency')
),
items as (
  insert into item (org_id, item_id, run_id, state, lane_id, rank, event_no, duties)
  values ($1, $2, $2, 'queued', $13::bigint, (date_part('epoch', statement_timestamp()) * 1000000)::bigint, 1, $16::smallint)
),
queued as (
  insert into ready (org_id, lane_id, rank, item_id)
  values ($1, $13, (date_part('epoch', statement_timestamp()) * 1000000)::bigint, $2)
),
arrived as (
  insert into arrival (org_id, lane_id, queue, capability, keys, offset_us, min_rank)
  values ($1, $13, $5, $3 || '@' || $4, string_to_array($8, E'\x1f'), $14::bigint, (date_part('epoch', statement_timestamp()) * 1000000)::bigint)
)
-- Executed before what stands above it, so that the org is entered by then: else nothing would be stored, but an error raised.
insert into event (org_id, run_id, event_no, kind, data, at)
values (case when $20::text is not null or $24::uuid[] is not null then open_submit($1, $19::boolean, $20, $21::int, $22::uuid, $23::uuid, $24)
             when $19 then set_config('millpond.org', $1::text, true)::bigint
             else $1 end,
        $2, 1, 'run.queued', $15::json, statement_timestamp());

-- name: submit
-- Inserts runs, live rows, first events, ready rows or timers, arrivals; nothing if a block that pays ($17) is gone. By itself it enters the org ($18 to $21).
with o as materialized (
  select case when $18::text[] is not null then enter_org($1, $18::text[], $19::int[], $20::uuid[], $21::uuid[]) end as org_id
),
t as materialized (
  select clock_timestamp() as at, (extract(epoch from clock_timestamp()) * 1000000)::bigint as us from o
),
-- Read for each row of t: in a statement by itself there is no org before that, and no row of it to be seen.
paying as materialized (
  select b.block_id from t cross join lateral (
    select b.block_id from quota_block b
    where b.org_id = $1 and b.block_id = any($17::uuid[]) and b.ends_at > t.at
    for key share
  ) b
),
w as materialized (
  select u.run_id, u.flow, u.version, u.queue, u.subject, u.priority, string_to_array(u.keys, chr(31)) as keys,
         u.timeout_s, u.traceparent, u.labels, u.input, u.lane_id, u.offset_us, u.delay_s, u.told, t.at,
         t.us + u.ord - 1 as rank, coalesce((u.more->>'duties')::smallint, 0::smallint) as duties,
         t.at + (u.more->>'deadline_s')::float8 * interval '1 second' as deadline_at, u.more
  from t, unnest($2::uuid[], $3::text[], $4::int[], $5::text[], $6::text[], $7::int[], $8::text[], $9::float8[],
                 $10::text[], $11::json[], $12::json[], $13::bigint[], $14::bigint[], $15::float8[], $16::json[],
                 $22::json[])
    with ordinality as u(run_id, flow, version, queue, subject, priority, keys, timeout_s, traceparent, labels, input,
                         lane_id, offset_us, delay_s, more, told, ord)
  where $17::uuid[] is null or (select count(*) from paying) = cardinality($17::uuid[])
),
spent as (
  insert into quota_spend (org_id, block_id, amount)
  select $1, p.block_id, n.amount from paying p, (select count(*) as amount from w) n where n.amount > 0
),
runs as (
  insert into run (org_id, run_id, flow, version, queue, subject, priority, keys, timeout_s, traceparent, labels,
                   input, created_at, deadline_at, dedup_key, parent_id, parent_key, close_policy, rerun_of, rerun_from,
                   continued_from, stamp, permission, lent, granted_by, behind, urgency)
  select $1, run_id, flow, version, queue, subject, priority, keys, timeout_s, traceparent, labels, input, at,
         deadline_at, more->>'dedup_key', (more->>'parent_id')::uuid, more->>'parent_key', more->>'close_policy',
         (more->>'rerun_of')::uuid, more->>'rerun_from', (more->>'continued_from')::uuid,
         (more->>'stamp')::int, more->>'permission', (more->>'lent')::uuid, more->>'granted_by',
         case when more->'behind' is not null then array(select json_array_elements_text(more->'behind')) end,
         more->>'urgency'
  from w
),
items as (
  insert into item (org_id, item_id, run_id, state, lane_id, rank, event_no, duties)
  select $1, run_id, run_id, case when delay_s > 0 then 'scheduled' else 'queued' end, lane_id, rank, 1, duties from w
),
queued as (
  insert into ready (org_id, lane_id, rank, item_id)
  select $1, lane_id, rank, run_id from w where delay_s <= 0
),
arrived as (
  insert into arrival (org_id, lane_id, queue, capability, keys, offset_us, min_rank)
  select $1, lane_id, queue, flow || '@' || version, keys, offset_us, min(rank)
  from w where delay_s <= 0 group by lane_id, queue, flow, version, keys, offset_us
),
timers as (
  insert into timer (org_id, run_id, step_key, kind, due_at)
  select $1, run_id, '', 'start', at + delay_s * interval '1 second' from w where delay_s > 0
  union all
  select $1, run_id, '!deadline', 'deadline', deadline_at from w where deadline_at is not null
)
insert into event (org_id, run_id, event_no, kind, data, at)
select $1, run_id, 1, case when delay_s > 0 then 'run.scheduled' else 'run.queued' end,
       told, at
from w;
