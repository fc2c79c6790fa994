-- Claims charge orgs by an estimate; what their work used beyond that, or less, is charged later.

-- Moves the virtual times of orgs in queues by so many worker-seconds. Under the claim's lock, since a claim writes what it
-- read; an org that has nothing waiting does not get credit for it: as it comes back it starts at the queue's clock. Where an
-- org is given back what had pushed that clock on, the clock goes back too, as far as no org that waits was charged more:
-- else whoever comes next would stand behind time that nobody used.
create function charge_shares(orgs bigint[], queues text[], seconds float8[]) returns void
  language plpgsql volatile
  set search_path = millpond, pg_temp
as $$
declare
  ahead text[];
  ahead_orgs bigint[];
begin
  perform pg_advisory_xact_lock(7741001);
  select array_agg(s.queue), array_agg(s.org_id) into ahead, ahead_orgs
  from unnest(orgs, queues, seconds) as u(org_id, queue, seconds)
  join share s on s.org_id = u.org_id and s.queue = u.queue
  join fair_clock c on c.queue = s.queue and s.virtual_s >= c.virtual_s
  where u.seconds < 0;
  update share s set virtual_s = s.virtual_s + u.seconds / s.weight
  from unnest(orgs, queues, seconds) as u(org_id, queue, seconds)
  where s.org_id = u.org_id and s.queue = u.queue;
  if ahead is null then
    return;
  end if;
  update fair_clock c set virtual_s = m.virtual_s
  from (
    select g.queue, greatest(max(g.virtual_s), max(a.virtual_s)) as virtual_s
    from (
      select s.queue, s.virtual_s from unnest(ahead_orgs, ahead) as u(org_id, queue)
      join share s on s.org_id = u.org_id and s.queue = u.queue
    ) g
    left join lateral (
      select s.virtual_s from share s where s.queue = g.queue and s.active order by s.virtual_s desc limit 1
    ) a on true
    group by g.queue
  ) m
  where c.queue = m.queue and m.virtual_s < c.virtual_s;
end
$$;
