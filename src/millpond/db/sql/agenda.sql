-- What there is to be done for all, asked in one message; reads only.

-- name: look
-- Names what there is to be done. Whether a session is over is asked with $1, whether leases are left of one that is gone with $7, what is rare (and how many workers there are) with $2, work to be done alone with $3 (its abilities) and $4 (queues), whether runs spent something on models with $5, whether they used worker time with $6.
select clock_timestamp() as now, extract(epoch from clock_timestamp() - pg_postmaster_start_time())::float8 as uptime_s, n.due_s,
       case when $2::boolean then (select count(*)::int from worker where expires_at > clock_timestamp() and not draining) end as workers,
       array_remove(array[
         case when n.due_s <= 0 then 'timers' end,
         case when exists (select from schedule where not is_paused and next_due_at <= clock_timestamp()) then 'schedules' end,
         case when exists (select from trigger_group where due_at <= clock_timestamp()) then 'groups' end,
         case when exists (select from chore) then 'chores' end,
         case when $5::boolean and exists (select from usage_part where models is not null) then 'spent' end,
         case when $6::boolean and exists (select from usage_part where models is null) then 'usage' end,
         case when $1::boolean and exists (select from worker where expires_at < clock_timestamp())
                or $7::boolean and exists (select from lease l where l.worker_id not in (select w.worker_id from worker w))
           then 'dead' end,
         case when $2 and exists (select from meter) then 'meters' end,
         case when $2 and (exists (select from brake) or exists (select from failing)) then 'brakes' end,
         case when $2 and (exists (select from reservation) or exists (select from lease_use)) then 'tokens' end,
         case when $2 and (exists (select from step_lease) or exists (select from step_need)) then 'lines' end,
         case when $2 and exists (select from crossing) then 'crossings' end,
         case when $2 and exists (select from delta) then 'deltas' end,
         case when $3::text[] is not null
                   and (exists (select from arrival where lane_id & 2 = 2 and queue = any($4::text[]) and capability = any($3))
                        or exists (select from lane where active and lane_id & 2 = 2 and queue = any($4) and capability = any($3)))
           then 'suspects' end], null) as todo
from (select extract(epoch from min(due_at) - clock_timestamp())::float8 as due_s from timer) n;
