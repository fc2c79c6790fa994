-- name: append
-- Numbers and stores events of one run under its live row's lock, and adds duties; the row must exist.
with n as (
  update item set event_no = event_no + cardinality($3::text[]), duties = duties | $6::smallint
  where org_id = $1 and item_id = $2
  returning event_no - cardinality($3::text[]) as base
)
insert into event (org_id, run_id, event_no, kind, step_key, data)
select $1, $2, n.base + u.ord, u.kind, u.step_key, u.data
from n, unnest($3::text[], $4::text[], $5::json[]) with ordinality as u(kind, step_key, data, ord);

-- name: page
-- Reads events of one run after a number, in order.
select run_id, event_no, kind, step_key, data, at
from event where org_id = $1 and run_id = $2 and event_no > $3
order by event_no limit $4;

-- name: last
-- Reads the newest event of one run; every run has one.
select event_no, kind from event where org_id = $1 and run_id = $2 order by event_no desc limit 1;
