-- Limits of the platform that settings and the code of flows declare; one that an operator set stands above them.

-- All that is declared: by the settings (`origin` is empty), or by a flow (`origin` is its name). For a key and kind what the settings say
-- goes first, then what was declared last; that is what platform_limit has, unless an operator set another there. Global.
create table declared_limit (
  source text not null check (source in ('settings', 'code')),
  origin text not null,
  like platform_limit including defaults including constraints,
  primary key (key, kind, source, origin)
);
create index declared_limit_origin on declared_limit (source, origin);
grant select, insert, update, delete on declared_limit to millpond_app;

-- Where what holds comes from.
alter table platform_limit
  add column source text not null default 'api' check (source in ('api', 'settings', 'code'));

-- What is the platform's is changed where no org is set.
do $$
declare of_all text;
begin
  foreach of_all in array array['platform_limit', 'declared_limit', 'signing_key', 'seal_key'] loop
    execute format('create trigger of_platform before insert or update or delete on %I
      for each statement execute function of_platform()', of_all);
  end loop;
end $$;
