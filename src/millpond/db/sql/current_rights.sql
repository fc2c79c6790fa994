-- Rights of runs.

-- name: now
-- Tells what each of somebody may now (function of the migrations).
select denied, role, custom, scopes, is_read_only from rights_now($1::bigint[], $2::text[], $3::uuid[]) order by nth;

-- name: refused
-- Tells once that a step was refused, since its run's subject may not any more.
insert into audit (org_id, audit_id, subject, granted_by, action, resource, run_id, details)
values ($1, $2, $3, $4, 'run.refused', $5, $6, $7)
on conflict do nothing;
