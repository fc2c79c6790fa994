-- name: add
-- Tells of a deed in an org.
insert into audit (org_id, audit_id, subject, granted_by, action, resource, run_id, address, details)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9::json);

-- name: add_platform
-- Tells of a deed on the platform itself.
insert into platform_audit (audit_id, subject, action, resource, address, details)
values ($1, $2, $3, $4, $5, $6::json);
