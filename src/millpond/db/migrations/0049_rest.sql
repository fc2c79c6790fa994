-- A machine at rest: each look of autovacuum at a table makes every session plan anew what names it, for milliseconds, which whoever
-- comes next waits for. By the default of 50 changes, that was each table of the engine every five seconds, for a run now and then.

-- How the statements on these go does not hang on what is counted of them.
do $$
declare hot text;
begin
  foreach hot in array array['ready', 'arrival', 'lease', 'lane', 'share', 'item', 'timer', 'worker', 'fair_clock', 'usage_part',
                             'step_lease', 'step_need', 'reservation', 'lease_use', 'run_use', 'delta'] loop
    execute format('alter table %I set (autovacuum_analyze_threshold = 20000, autovacuum_vacuum_insert_threshold = 20000)', hot);
  end loop;
end $$;
alter table fair_clock set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- What has been grows, and lists of it are planned by what is counted: in proportion, but not from 50 on.
do $$
declare past text;
begin
  foreach past in array array['run', 'event', 'step', 'payload', 'usage_day'] loop
    execute format('alter table %I set (autovacuum_analyze_threshold = 5000, autovacuum_vacuum_threshold = 5000,
      autovacuum_vacuum_insert_threshold = 10000)', past);
  end loop;
end $$;
