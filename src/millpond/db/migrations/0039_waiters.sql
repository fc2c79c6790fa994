-- Steps that wait beside other branches of their runs stand in line for every claim, from their first refusal on.

create index step_lease_line on step_lease (org_id, since_us) where since_us is not null;

-- What tries of steps count on beside their runs, in the form of `claim_rooms` and read after its lock: keys of the run, an
-- empty one, keys of the step (seated); and which steps wait beside working branches of runs of live workers, with since when
-- (us), how far their org has come in the queue (n, µs of virtual time), the offset of the run's lane (lane_id) and, as room, who
-- it is: item and step (asked). Of these the first 32 of an org, of the 128 orgs that have waited longest; 128 at most.
create or replace function claim_seated()
  returns table (kind text, org_id bigint, lane_id bigint, queue text, capability text, keys text[], room text, n bigint,
                 us bigint)
  language plpgsql volatile rows 10
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
begin
  if not exists (select from step_lease) then
    return;
  end if;
  return query
  select 'seated', h.org_id, h.lane_id, l.queue, l.capability, l.keys || array[''] || h.keys, '', h.n, null::bigint
  from (select e.org_id, e.lane_id, s.keys, count(*) as n
        from step_lease s join lease e on e.org_id = s.org_id and e.item_id = s.item_id and e.token = s.token
        where s.since_us is null
        group by e.org_id, e.lane_id, s.keys) h
  join lane l on l.org_id = h.org_id and l.lane_id = h.lane_id;
  if not exists (select from step_lease s where s.since_us is not null) then
    return;
  end if;
  return query
  select 'asked', a.org_id, l.offset_us, l.queue, l.capability, l.keys || array[''] || a.keys,
         a.item_id || ' ' || a.step_key,
         (greatest(h.virtual_s, c.virtual_s, 0) * 1000000)::bigint, a.since_us
  from (
    -- From org to org through the index, however many steps of one wait.
    with recursive o as (
      (select s.org_id, s.since_us from step_lease s where s.since_us is not null order by s.org_id, s.since_us limit 1)
      union all
      select n.org_id, n.since_us from o cross join lateral (
        select s.org_id, s.since_us from step_lease s
        where s.since_us is not null and s.org_id > o.org_id order by s.org_id, s.since_us limit 1
      ) n
    )
    select y.* from (select o.org_id from o order by o.since_us limit 128) f
    cross join lateral (
      select s.org_id, s.item_id, s.step_key, s.keys, s.since_us, e.lane_id
      from step_lease s
      cross join lateral (
        select e.lane_id from lease e join worker k on k.worker_id = e.worker_id and k.expires_at > clock_timestamp()
        where e.org_id = any(array[s.org_id]) and e.item_id = any(array[s.item_id]) and e.token = s.token offset 0
      ) e
      where s.org_id = f.org_id and s.since_us is not null order by s.since_us limit 32
    ) y
  ) a
  join lane l on l.org_id = a.org_id and l.lane_id = a.lane_id
  left join share h on h.org_id = a.org_id and h.queue = l.queue
  left join fair_clock c on c.queue = l.queue
  order by a.since_us limit 128;
end
$$;
