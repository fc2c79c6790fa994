-- Knowledge: bases, documents in versions, their bytes and text, chunks with vectors and lexemes.
-- The engine's role has no right on any of it. Every key and foreign key starts with org_id.

-- A base holds documents whose vectors come from one embedder.
create table knowledge_base (
  org_id bigint not null references org (org_id),
  base_id uuid not null,
  name text not null check (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
  embedder text not null,
  created_at timestamptz not null default clock_timestamp(),
  primary key (org_id, base_id),
  unique (org_id, name)
);

-- `version` is the newest upload, `ready_version` the one that searches see.
create table document (
  org_id bigint not null,
  document_id uuid not null,
  base_id uuid not null,
  filename text not null check (length(filename) between 1 and 512),
  title text not null,
  media_type text not null,
  size_bytes bigint not null check (size_bytes > 0),
  digest bytea not null check (length(digest) = 32),
  version integer not null default 1 check (version >= 1),
  ready_version integer check (ready_version between 1 and version),
  status text not null default 'pending' check (status in ('pending', 'processing', 'ready', 'failed')),
  stage text check (stage in ('parse', 'chunk', 'embed', 'index')),
  progress double precision not null default 0 check (progress between 0 and 1),
  reason text,
  chunk_count integer,
  run_id uuid,
  created_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp(),
  primary key (org_id, document_id),
  unique (org_id, base_id, filename),
  foreign key (org_id, base_id) references knowledge_base (org_id, base_id) on delete cascade,
  check ((status = 'failed') = (reason is not null)),
  check (status <> 'ready' or ready_version = version)
);

-- The bytes as uploaded.
create table document_content (
  org_id bigint not null,
  document_id uuid not null,
  version integer not null,
  content bytea not null,
  primary key (org_id, document_id, version),
  foreign key (org_id, document_id) references document (org_id, document_id) on delete cascade
);
alter table document_content alter column content set storage external;

-- The text that a parser made of them: citations are spans of it. `page_starts` has the offset of each page, if any.
create table document_text (
  org_id bigint not null,
  document_id uuid not null,
  version integer not null,
  text text not null,
  page_starts integer[] not null default '{}',
  primary key (org_id, document_id, version),
  foreign key (org_id, document_id) references document (org_id, document_id) on delete cascade
);

-- A chunk is the span [start_char, end_char) of that text, in characters. Its vector is null until it is embedded.
create table chunk (
  org_id bigint not null,
  base_id uuid not null,
  document_id uuid not null,
  version integer not null,
  ordinal integer not null check (ordinal >= 0),
  start_char integer not null check (start_char >= 0),
  end_char integer not null check (end_char > start_char),
  text text not null check (char_length(text) = end_char - start_char),
  tsv tsvector not null,
  embedding public.vector(384),
  primary key (org_id, document_id, version, ordinal),
  foreign key (org_id, document_id) references document (org_id, document_id) on delete cascade,
  foreign key (org_id, base_id) references knowledge_base (org_id, base_id) on delete cascade
);
create index chunk_by_base on chunk (org_id, base_id);
create index chunk_by_lexeme on chunk using gin (tsv);

do $$
declare tenant text;
begin
  foreach tenant in array array['knowledge_base', 'document', 'document_content', 'document_text', 'chunk'] loop
    execute format('alter table %I enable row level security', tenant);
    execute format('alter table %I force row level security', tenant);
    execute format('create policy org_scope on %I to millpond_app
      using (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)
      with check (org_id = nullif(current_setting(''millpond.org'', true), '''')::bigint)', tenant);
  end loop;
end $$;
grant select, insert, update, delete on knowledge_base, document, document_content, document_text, chunk to millpond_app;

-- Full text under row-level security: `@@` is not leakproof, so a policy that filters keeps it from its index. The one
-- function below runs as a role that reads chunks of all orgs and nothing else, that nobody can log in as, and names the
-- org itself. Roles belong to the whole server: another database's migration may make it at the same moment.
do $$
begin
  if not exists (select from pg_roles where rolname = 'millpond_search') then
    begin
      create role millpond_search nologin;
    exception when duplicate_object or unique_violation then null;
    end;
  end if;
  -- From Postgres 16 on, whoever makes a role may grant it but is not in it.
  if not pg_has_role(current_user, 'millpond_search',
                     case when current_setting('server_version_num')::int >= 160000 then 'set' else 'member' end) then
    execute format('grant millpond_search to %I', current_user);
  end if;
  -- Ours stays the schema: the right to make a function in it is lent for the change of owner below.
  execute format('grant usage, create on schema %I to millpond_search', current_schema());
end $$;
create policy text_search on chunk for select to millpond_search using (true);
create policy text_search on document for select to millpond_search using (true);
grant select (org_id, base_id, document_id, version, ordinal, tsv) on chunk to millpond_search;
grant select (org_id, base_id, document_id, ready_version) on document to millpond_search;

-- Chunks of the base that hold any of the question's lexemes, with the share of the question that they cover: each
-- lexeme weighs ln(1 + chunks in the base / chunks that hold it), one that no chunk holds the most.
create function search_text(base uuid, question text, at_most integer)
  returns table (document_id uuid, version integer, ordinal integer, coverage double precision)
  language sql stable security definer parallel safe rows 100
  set search_path = pg_catalog, millpond, pg_temp
as $$
  with asked as materialized (
    select lexeme, quote_literal(lexeme)::tsquery as query
    from unnest(to_tsvector('english', question)) limit 64
  ),
  any_of as materialized (
    select string_agg(quote_literal(lexeme), ' | ')::tsquery as query from asked
  ),
  visible as materialized (
    select d.document_id, d.ready_version
    from document d
    where d.org_id = nullif(current_setting('millpond.org', true), '')::bigint
      and d.base_id = base and d.ready_version is not null
  ),
  total as materialized (
    select count(*)::double precision as chunks
    from chunk c join visible v on v.document_id = c.document_id and v.ready_version = c.version
    where c.org_id = nullif(current_setting('millpond.org', true), '')::bigint and c.base_id = base
  ),
  hit as materialized (
    select c.document_id, c.version, c.ordinal, c.tsv
    from chunk c
    where c.org_id = nullif(current_setting('millpond.org', true), '')::bigint
      and c.base_id = base
      and c.tsv @@ (select query from any_of)
      and exists (select from visible v where v.document_id = c.document_id and v.ready_version = c.version)
  ),
  pair as materialized (
    select h.document_id, h.version, h.ordinal, a.lexeme from hit h join asked a on h.tsv @@ a.query
  ),
  weight as materialized (
    select a.lexeme, ln(1 + total.chunks / greatest(count(p.lexeme), 0.5)) as weight
    from asked a cross join total left join pair p on p.lexeme = a.lexeme
    group by a.lexeme, total.chunks
  )
  select p.document_id, p.version, p.ordinal, sum(w.weight) / (select sum(weight) from weight)
  from pair p join weight w on w.lexeme = p.lexeme
  group by p.document_id, p.version, p.ordinal
  order by 4 desc, 1, 2, 3
  limit at_most
$$;
alter function search_text(uuid, text, integer) owner to millpond_search;
do $$
begin
  execute format('revoke create on schema %I from millpond_search', current_schema());
end $$;
revoke all on function search_text(uuid, text, integer) from public;
grant execute on function search_text(uuid, text, integer) to millpond_app;
