-- Which version of a flow a schedule or a trigger starts.

-- name: targets
-- For each flow wanted: the version asked for; else the newest that a live worker has, else the newest published.
select u.ord::int as nth, f.version, f.queue, f.timeout_s, f.deadline_s, f.input_schema, f.is_served, f.keys, f.urgency
from unnest($1::text[], $2::int[]) with ordinality as u(flow, version, ord)
cross join lateral (
  select v.version, v.queue, v.timeout_s, v.deadline_s, v.input_schema, v.keys, v.urgency,
         exists (select from worker w
                 where w.expires_at > clock_timestamp() and v.flow || '@' || v.version = any(w.capabilities)) as is_served
  from flow_version v
  where v.flow = u.flow and (u.version is null or v.version = u.version)
  order by is_served desc, v.version desc limit 1
) f;
