-- name: create_base
-- Makes a base, or finds it by its name.
with made as (
  insert into knowledge_base (org_id, base_id, name, embedder) values ($1, $2, $3, $4)
  on conflict (org_id, name) do nothing
  returning base_id, name, embedder
)
select base_id, name, embedder from made
union all
select base_id, name, embedder from knowledge_base where org_id = $1 and name = $3
limit 1;

-- name: base_by_name
-- Finds a base by its name.
select base_id, name, embedder from knowledge_base where org_id = $1 and name = $2;

-- name: bases
-- Lists the bases of an org with their documents counted.
select b.base_id, b.name, b.embedder, b.created_at, count(d.document_id) as documents
from knowledge_base b
left join document d on d.org_id = b.org_id and d.base_id = b.base_id
where b.org_id = $1
group by b.org_id, b.base_id
order by b.name;

-- name: upload
-- Stores a document by its name in the base; other bytes under a known name make a new version.
insert into document as d (org_id, document_id, base_id, filename, title, media_type, size_bytes, digest, run_id)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
on conflict (org_id, base_id, filename) do update set
  version = d.version + (d.digest <> excluded.digest)::int,
  title = case when d.digest = excluded.digest then d.title else excluded.title end,
  media_type = excluded.media_type,
  size_bytes = excluded.size_bytes,
  digest = excluded.digest,
  run_id = excluded.run_id,
  status = case when d.digest = excluded.digest and d.status = 'ready' then 'ready' else 'pending' end,
  stage = null,
  progress = case when d.digest = excluded.digest and d.status = 'ready' then 1 else 0 end,
  reason = null,
  updated_at = clock_timestamp()
returning document_id, version;

-- name: store_content
-- Stores the bytes of a version once.
insert into document_content (org_id, document_id, version, content) values ($1, $2, $3, $4)
on conflict (org_id, document_id, version) do nothing;

-- name: documents
-- Lists the documents of a base; one whose run ended without finishing it is failed, with that as the reason.
select d.document_id, d.filename, d.title, d.media_type, d.size_bytes, encode(d.digest, 'hex') as digest,
       d.version, d.ready_version, d.stage, d.progress, d.chunk_count, d.run_id, d.created_at, d.updated_at,
       case when d.status in ('pending', 'processing') and r.outcome is not null then 'failed' else d.status end as status,
       case when d.status in ('pending', 'processing') and r.outcome is not null
            then 'the run that ingests it ' || case r.outcome when 'cancelled' then 'was cancelled' else 'ended early' end
            else d.reason end as reason
from document d
left join run r on r.org_id = d.org_id and r.run_id = d.run_id
where d.org_id = $1 and d.base_id = $2
order by d.filename;

-- name: document
-- Reads one document's row.
select d.document_id, d.base_id, d.filename, d.title, d.media_type, d.version, d.ready_version, d.status,
       b.embedder
from document d
join knowledge_base b on b.org_id = d.org_id and b.base_id = d.base_id
where d.org_id = $1 and d.document_id = $2;

-- name: remove
-- Deletes a document with its bytes, texts and chunks.
delete from document where org_id = $1 and document_id = $2 returning document_id;

-- name: content
-- Reads the bytes of one version.
select content from document_content where org_id = $1 and document_id = $2 and version = $3;

-- name: text
-- Reads the parsed text of one version.
select text, page_starts from document_text where org_id = $1 and document_id = $2 and version = $3;

-- name: stand
-- Notes where the ingestion of a version stands, unless a newer version was uploaded since.
update document
set status = 'processing', stage = $4, progress = $5, reason = null, updated_at = clock_timestamp()
where org_id = $1 and document_id = $2 and version = $3 and ready_version is distinct from version
returning document_id;

-- name: fail
-- Notes why the ingestion of a version failed; what was ready before stays searchable.
update document
set status = 'failed', reason = $4, updated_at = clock_timestamp()
where org_id = $1 and document_id = $2 and version = $3 and ready_version is distinct from version
returning document_id;

-- name: store_text
-- Stores the text of a version; parsing again replaces it only while no chunk points into it.
insert into document_text as t (org_id, document_id, version, text, page_starts) values ($1, $2, $3, $4, $5)
on conflict (org_id, document_id, version) do update
set text = excluded.text, page_starts = excluded.page_starts
where not exists (select from chunk c where c.org_id = $1 and c.document_id = $2 and c.version = $3);

-- name: set_title
-- Gives a document the title that its text says.
update document set title = $4 where org_id = $1 and document_id = $2 and version = $3;

-- name: store_chunks
-- Cuts the stored text of a version into chunks at the spans $5, $6; chunks already there stay.
insert into chunk (org_id, base_id, document_id, version, ordinal, start_char, end_char, text, tsv)
select d.org_id, d.base_id, d.document_id, t.version, s.ordinal - 1, s.start_char, s.end_char, p.part,
       to_tsvector('english', d.title || E'\n' || p.part)
from document d
join document_text t on t.org_id = d.org_id and t.document_id = d.document_id and t.version = $3
cross join unnest($4::int[], $5::int[]) with ordinality as s(start_char, end_char, ordinal)
cross join lateral (select substr(t.text, s.start_char + 1, s.end_char - s.start_char) as part) p
where d.org_id = $1 and d.document_id = $2
on conflict (org_id, document_id, version, ordinal) do nothing;

-- name: unembedded
-- Reads chunks of a range that have no vector yet.
select ordinal, text
from chunk
where org_id = $1 and document_id = $2 and version = $3 and ordinal >= $4 and ordinal < $5 and embedding is null
order by ordinal;

-- name: store_vectors
-- Gives chunks their vectors.
update chunk c
set embedding = v.vector::vector
from unnest($4::int[], $5::text[]) as v(ordinal, vector)
where c.org_id = $1 and c.document_id = $2 and c.version = $3 and c.ordinal = v.ordinal;

-- name: lock_document
-- Locks a document's row and counts what its version still lacks.
select d.version, d.ready_version,
       (select count(*) from chunk c where c.org_id = d.org_id and c.document_id = d.document_id and c.version = $3)
         as chunks,
       (select count(*) from chunk c where c.org_id = d.org_id and c.document_id = d.document_id and c.version = $3
          and c.embedding is null) as without_vector
from document d
where d.org_id = $1 and d.document_id = $2
for update of d;

-- name: publish
-- Makes a version the one that searches see.
update document
set ready_version = $3, status = 'ready', stage = null, progress = 1, reason = null, chunk_count = $4,
    updated_at = clock_timestamp()
where org_id = $1 and document_id = $2 and version = $3;

-- name: drop_chunks
-- Deletes chunks of other versions than the one that searches see and the newest.
delete from chunk c using document d
where c.org_id = $1 and c.document_id = $2 and d.org_id = c.org_id and d.document_id = c.document_id
  and c.version <> all (array[d.version, coalesce(d.ready_version, 0)]);

-- name: drop_texts
-- Deletes texts of versions that no chunk can come from any more.
delete from document_text t using document d
where t.org_id = $1 and t.document_id = $2 and d.org_id = t.org_id and d.document_id = t.document_id
  and t.version <> all (array[d.version, coalesce(d.ready_version, 0)]);

-- name: drop_contents
-- Deletes bytes of versions before the newest and the one that searches see.
delete from document_content o using document d
where o.org_id = $1 and o.document_id = $2 and d.org_id = o.org_id and d.document_id = o.document_id
  and o.version <> all (array[d.version, coalesce(d.ready_version, 0)]);

-- name: search
-- Ranks passages by weighted fusion of likeness ($5) and coverage of the question's words ($6); $2 base, $3 vector.
with near as (
  select c.document_id, c.version, c.ordinal
  from chunk c
  join document d on d.org_id = c.org_id and d.document_id = c.document_id and d.ready_version = c.version
  where c.org_id = $1 and c.base_id = $2
  order by c.embedding <=> $3::vector
  limit $7::int
),
worded as (
  select document_id, version, ordinal, coverage from search_text($2, $4::text, $7::int)
),
candidate as (
  select document_id, version, ordinal from near
  union
  select document_id, version, ordinal from worded
),
scored as (
  select c.document_id, c.version, c.ordinal, c.start_char, c.end_char, c.text,
         1 - (c.embedding <=> $3::vector) as vector_score, coalesce(w.coverage, 0) as text_score
  from candidate k
  join chunk c on c.org_id = $1 and c.document_id = k.document_id and c.version = k.version and c.ordinal = k.ordinal
  left join worded w on w.document_id = k.document_id and w.version = k.version and w.ordinal = k.ordinal
)
select s.document_id, d.title, d.filename, s.version, s.ordinal, s.start_char, s.end_char, s.text,
       case when cardinality(t.page_starts) > 0
            then (select count(*) from unnest(t.page_starts) p where p <= s.start_char)::int end as page,
       s.vector_score, s.text_score, $5::float8 * s.vector_score + $6::float8 * s.text_score as score
from scored s
join document d on d.org_id = $1 and d.document_id = s.document_id
join document_text t on t.org_id = $1 and t.document_id = s.document_id and t.version = s.version
order by score desc, s.document_id, s.ordinal
limit $8::int;
