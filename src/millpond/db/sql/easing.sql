-- Brakes as people see them and take them off.

-- name: brakes
-- What holds back work of the org that asks, and everybody's (function of the migrations).
select owner, key, until_us, factor, in_use, hits, opened_us, step, reason, now_us from brakes() order by owner, key;

-- name: release
-- Takes off a brake of the org that asks, or without one everybody's (function of the migrations).
select release_brake($1);
