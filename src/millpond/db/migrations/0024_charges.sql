-- Claims charge orgs by an estimate; what their work used beyond that, or less, is charged later.

-- Moves the virtual times of orgs in queues by so many worker-seconds. Under the claim's lock, since a claim writes what it
-- read; an org that has nothing waiting does not get credit for it: as it comes back it starts at the queue's clock.
create function charge_shares(orgs bigint[], queues text[], seconds float8[]) returns void
  language plpgsql volatile
  set search_path = millpond, pg_temp
as $$
begin
  perform pg_advisory_xact_lock(7741001);
  update share s set virtual_s = s.virtual_s + u.seconds / s.weight
  from unnest(orgs, queues, seconds) as u(org_id, queue, seconds)
  where s.org_id = u.org_id and s.queue = u.queue;
end
$$;
