-- What the command line asks about an installation: live workers, roles, server, clock.

-- name: worker_is_live
-- Whether the worker process (host, pid) has a live heartbeat.
select exists (select from worker where host = $1 and pid = $2 and expires_at > clock_timestamp());

-- name: live_workers
-- Every worker with a live heartbeat.
select worker_id, host, pid, queues, capabilities, started_at, draining
  from worker
 where expires_at > clock_timestamp()
 order by started_at;

-- name: server
-- The server's version number, its clock, and what the current role may do that it must not.
select current_setting('server_version_num')::integer as version_num,
       current_setting('server_version') as version,
       clock_timestamp() as now,
       rolname as role,
       rolsuper as is_superuser,
       rolbypassrls as bypasses_rls,
       exists (select from pg_class c
                where c.relowner = r.oid and c.relnamespace = to_regnamespace('millpond')) as owns_tables
  from pg_roles r
 where rolname = current_user;
