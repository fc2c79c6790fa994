-- Charging: the fair order is kept by the worker time that orgs used.

-- name: charge
-- Moves orgs' virtual times under the claim's lock (function of the migrations); lost in a crash, it is a small unfairness.
select 1 from set_config('synchronous_commit', 'off', true), charge_shares($1::bigint[], $2::text[], $3::float8[]);

-- name: charge_crossings
-- Moves where orgs stand in rooms that several queues need (function of the migrations); lost in a crash, it is a small unfairness.
select 1 from set_config('synchronous_commit', 'off', true),
              charge_crossings($1::bigint[], $2::text[], $3::text[], $4::float8[]);
