-- Failures in a row, counted by all workers together: what opens a breaker.

-- How often in a row a step of this name failed on a key, in work of `owner` (0: everybody's), and when it did last. Written
-- with each failure; a success takes the row away in a worker where the step failed too, and so does a breaker that opens. Rows
-- that were broken off are deleted by upkeep. Global.
create table failing (
  owner bigint,
  key text check (length(key) between 3 and 500),
  step text,
  failures integer not null check (failures >= 1),
  failed_us bigint not null,
  primary key (owner, key, step)
);
grant select, insert, update, delete on failing to millpond_engine;
