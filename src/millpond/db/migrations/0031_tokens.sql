-- Tokens per period: what a claim reserves for each lease, what its work tells that it used, and the claim that settles both.

alter table org_limit drop constraint org_limit_kind_check, drop constraint org_limit_check;
alter table org_limit
  add constraint org_limit_kind_check check (kind in ('concurrency', 'rate', 'tokens')),
  add constraint org_limit_check check ((kind in ('rate', 'tokens')) = (period_s is not null and burst is not null));
alter table platform_limit drop constraint platform_limit_kind_check, drop constraint platform_limit_check;
alter table platform_limit
  add constraint platform_limit_kind_check check (kind in ('concurrency', 'rate', 'tokens')),
  add constraint platform_limit_check check ((kind in ('rate', 'tokens')) = (period_s is not null and burst is not null));

-- Of tokens also how many microseconds one of them took when the meter was stored: what was used is kept in tokens,
-- however fast they come by another limit.
alter table meter add column pace double precision check (pace > 0);

-- Tokens that a lease has of one limit: as many as were reserved, or as it has used if that is more. `parts` are the
-- provider and model that the limit is on, `carried` those that the work counts on. `is_lost`: of some of it nobody knows
-- what it used, so that at least the estimate stands. By the claim alone.
create table reservation (
  org_id bigint,
  item_id uuid,
  token uuid,
  room text,
  capability text not null,
  tokens bigint not null check (tokens >= 0),
  used bigint not null default 0 check (used >= 0),
  is_lost boolean not null default false,
  parts text[] not null,
  carried text[] not null,
  primary key (org_id, item_id, token, room)
) with (fillfactor = 70);

-- What work under a lease with reservations used, written with the record that tells of it; or that a call was cut off or its
-- worker is gone (`is_lost`), so that nobody knows. The next claim takes it away.
create table lease_use (
  org_id bigint not null,
  item_id uuid not null,
  token uuid not null,
  keys text[] not null,
  tokens bigint not null check (tokens >= 0),
  is_lost boolean not null default false
);

do $$
declare hot text;
begin
  foreach hot in array array['reservation', 'lease_use'] loop
    execute format('alter table %I set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
      autovacuum_vacuum_cost_delay = 0)', hot);
    execute format('alter table %I enable row level security', hot);
    execute format('alter table %I force row level security', hot);
    execute format('create policy org_scope on %I to millpond_app
      using (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)
      with check (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)', hot);
    execute format('create policy engine_duty on %I to millpond_engine using (true) with check (true)', hot);
    execute format('grant select, insert, update, delete on %I to millpond_engine', hot);
  end loop;
end $$;

-- The limit under whose name lanes stand: those under tokens stand there by what they need (`tokens:2000 …`).
create function room_base(room text) returns text language sql immutable parallel safe
as $$ select regexp_replace(room, '^tokens[:~][0-9]+ ', 'tokens ') $$;
create index room_tokens on room (room_base(room)) where room like 'tokens%';

-- Settles reservations, under the claim's lock: takes in what work told, gives up those whose leases are gone, and lets the
-- next look at lanes that stand where tokens came back be now. For each reservation that changes: its limit, how many tokens more
-- (or fewer) it comes to, and, where it is over, what its work used; none where its worker was lost, whose estimate stands. Then,
-- without a capability, the limits of which tokens may come back while lanes stand there.
create function claim_tokens()
  returns table (room text, capability text, delta bigint, used bigint)
  language plpgsql volatile rows 50
  set search_path = millpond, pg_temp
as $$
#variable_conflict use_column
begin
  perform pg_advisory_xact_lock(7741001);
  return query
  with u as materialized (
    delete from lease_use returning org_id, item_id, token, keys, tokens, is_lost
  ),
  t as materialized (
    select r.org_id, r.item_id, r.token, r.room, sum(u.tokens)::bigint as more, bool_or(u.is_lost) as is_lost
    from u join reservation r on r.org_id = u.org_id and r.item_id = u.item_id and r.token = u.token
    -- Not here where the limit is on one provider or model, and it was another one that the work counts on too.
    where not exists (
      select from unnest(r.parts) p(part) where part <> all(u.keys) and exists (
        select from unnest(r.carried) c(key) where key = any(u.keys) and split_part(key, ':', 1) = split_part(part, ':', 1)))
    group by r.org_id, r.item_id, r.token, r.room
  ),
  s as materialized (
    select r.org_id, r.item_id, r.token, r.room, r.capability, greatest(r.tokens, r.used) as had,
           r.used + coalesce(t.more, 0) as used, l.token is null as is_over, r.is_lost or coalesce(t.is_lost, false) as is_lost,
           case when l.token is null and not r.is_lost and not coalesce(t.is_lost, false) then r.used + coalesce(t.more, 0)
                else greatest(r.tokens, r.used + coalesce(t.more, 0)) end as has
    from reservation r
    left join lease l on l.org_id = r.org_id and l.item_id = r.item_id and l.token = r.token
    left join t on t.org_id = r.org_id and t.item_id = r.item_id and t.token = r.token and t.room = r.room
    where l.token is null or t.more > 0 or t.is_lost
  ),
  gone as (
    delete from reservation r using s
    where s.is_over and r.org_id = s.org_id and r.item_id = s.item_id and r.token = s.token and r.room = s.room
  ),
  more as (
    update reservation r set used = s.used, is_lost = s.is_lost from s
    where not s.is_over and r.org_id = s.org_id and r.item_id = s.item_id and r.token = s.token and r.room = s.room
  ),
  due as (
    update room x set due_us = 0
    from (select s.room from s group by s.room having sum(s.has - s.had) < 0) b
    where room_base(x.room) = b.room and x.room like 'tokens%' and x.due_us > 0 and x.due_us < 4611686018427387904
  )
  select s.room, s.capability, s.has - s.had, case when s.is_over and not s.is_lost then s.used end from s;
  return query
  select distinct r.room, '', 0::bigint, null::bigint from reservation r
  where exists (select from room x where room_base(x.room) = r.room and x.room like 'tokens%');
end
$$;

-- As before, with the pace of meters of tokens.
drop function room_use(text[]);
create function room_use(rooms text[])
  returns table (room text, in_use bigint, maximum bigint, looked_at timestamptz, tat_us bigint, pace double precision)
  language sql stable security definer
  set search_path = millpond, pg_temp
as $$
  select u.room, r.in_use, r.maximum, r.looked_at, m.tat_us, m.pace
  from unnest(rooms) as u(room)
  left join lateral (
    select x.in_use, x.maximum, x.looked_at from room x where x.room = u.room order by x.looked_at desc limit 1
  ) r on true
  left join meter m on m.room = u.room
$$;
revoke all on function room_use(text[]) from public;
grant execute on function room_use(text[]) to millpond_app;
