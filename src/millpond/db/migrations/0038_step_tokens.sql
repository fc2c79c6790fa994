-- Tokens of steps' own keys: what a claim reserves for a try beside its run, told of and settled by itself.

-- '' for what the work item itself has reserved, else the step whose try it is of: that is over with the row of its room in
-- `step_lease`, or with the lease.
alter table reservation drop constraint reservation_pkey;
alter table reservation add column step_key text not null default '';
alter table reservation add primary key (org_id, item_id, token, room, step_key);

-- Which step used it, '' for one without keys of its own; null where it tells of all that the lease has reserved. `carried`:
-- the providers and models among the step's keys.
alter table lease_use add column step_key text, add column carried text[] not null default '{}';

-- A try under this lease was given up that used what is not told yet: its reservation stays, also while its step waits again.
alter table step_lease add column is_untold boolean not null default false;

-- As before, also for steps: what one with keys of its own used belongs to its own reservation of a limit, and where it has none
-- there, to that of its run.
create or replace function claim_tokens()
  returns table (room text, capability text, delta bigint, used bigint)
  language plpgsql volatile rows 50
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
begin
  perform pg_advisory_xact_lock(7741001);
  return query
  with u as materialized (
    delete from lease_use returning org_id, item_id, token, keys, tokens, is_lost, step_key, carried
  ),
  t as materialized (
    select r.org_id, r.item_id, r.token, r.room, r.step_key, sum(u.tokens)::bigint as more,
           bool_or(u.is_lost and u.step_key is not null) as is_cut, bool_or(u.is_lost and u.step_key is null) as is_gone
    from u join reservation r on r.org_id = u.org_id and r.item_id = u.item_id and r.token = u.token
    where (u.step_key is null or r.step_key = u.step_key
           or (r.step_key = '' and not exists (
             select from reservation o where o.org_id = r.org_id and o.item_id = r.item_id and o.token = r.token
                                         and o.room = r.room and o.step_key = u.step_key)))
      -- Not here where the limit is on one provider or model, and it was another one that the work counts on too; what was
      -- asked may have a name that is nobody's key: then it is what the step counts on.
      and not exists (
        select from unnest(r.parts) p(part) where part <> all(u.keys) and (
          exists (select from unnest(r.carried || u.carried) c(key)
                  where key = any(u.keys) and split_part(key, ':', 1) = split_part(part, ':', 1))
          or (part <> all(u.carried) and exists (
            select from unnest(u.carried) c(key) where split_part(key, ':', 1) = split_part(part, ':', 1)))))
    group by r.org_id, r.item_id, r.token, r.room, r.step_key
  ),
  f as materialized (
    select r.*, greatest(r.tokens, r.used) as had, r.used + coalesce(t.more, 0) as uses, t.more,
           l.token is null or (r.step_key <> '' and h.token is null) as is_over,
           -- Of a worker that is gone nobody knows what the tries used that were under way.
           r.is_lost or coalesce(t.is_cut, false)
             or (coalesce(t.is_gone, false) and (r.step_key = '' or h.token is not null)) as is_unknown
    from reservation r
    left join lease l on l.org_id = r.org_id and l.item_id = r.item_id and l.token = r.token
    -- By key, whatever the planner takes the table for: it is most often empty.
    left join lateral (
      select h.token from step_lease h
      where r.step_key <> '' and h.org_id = r.org_id and h.item_id = any(array[r.item_id])
        and h.step_key = any(array[r.step_key]) and h.token = r.token and (h.since_us is null or h.is_untold) offset 0
    ) h on true
    left join t on t.org_id = r.org_id and t.item_id = r.item_id and t.token = r.token and t.room = r.room
               and t.step_key = r.step_key
  ),
  s as materialized (
    select f.org_id, f.item_id, f.token, f.room, f.step_key, f.capability, f.had, f.uses, f.is_over, f.is_unknown,
           case when f.is_over and not f.is_unknown then f.uses else greatest(f.tokens, f.uses) end as has
    from f where f.is_over or f.more > 0 or f.is_unknown <> f.is_lost
  ),
  gone as (
    delete from reservation r using s
    where s.is_over and r.org_id = s.org_id and r.item_id = s.item_id and r.token = s.token and r.room = s.room
      and r.step_key = s.step_key
  ),
  more as (
    update reservation r set used = s.uses, is_lost = s.is_unknown from s
    where not s.is_over and r.org_id = s.org_id and r.item_id = s.item_id and r.token = s.token and r.room = s.room
      and r.step_key = s.step_key
  ),
  due as (
    update room x set due_us = 0
    from (select s.room from s group by s.room having sum(s.has - s.had) < 0) b
    where room_base(x.room) = b.room and x.room like 'tokens%' and x.due_us > 0 and x.due_us < 4611686018427387904
  )
  select s.room, s.capability, s.has - s.had, case when s.is_over and not s.is_unknown then s.uses end from s;
  return query
  select distinct r.room, '', 0::bigint, null::bigint from reservation r
  where exists (select from room x where room_base(x.room) = r.room and x.room like 'tokens%');
end
$$;
